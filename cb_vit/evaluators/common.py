"""What evaluators share: their settings, and building them from `config.evals`.

An evaluator is a module of this room with a `Config` and an `Evaluator`:

    Evaluator(predict_fn, *, config, source, preprocess, sharding), with `config` and `source` as attributes
    Evaluator.run(train_state) -> yields (metric name, value)

`predict_fn(train_state, images)` → (logits, out) is pure; evaluators jit it with their own arithmetic.
"""
from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cb_vit import datasets
from cb_vit.config import ConfigError, Duration, parse
from cb_vit.datasets.contents import describe
from cb_vit.input_pipeline import check_example, error_share, example_spec
from cb_vit.pp import builder
from cb_vit.registry import Registry
from cb_vit.train_state import TrainState

logger = logging.getLogger(__name__)
EMA = "ema/"  # stands before the names of metrics of the averaged parameters
EVALUATORS = Registry("evaluator", {"classification": "cb_vit.evaluators.classification"})
PredictFn = Callable[[TrainState, jax.Array], tuple[jax.Array, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """What every block of `config.evals` may say; an evaluator's own `Config` adds to it.

    One with a `__post_init__` of its own calls `super().__post_init__()`.

    Attributes:
        type: which evaluator, e.g. "classification".
        data: the source, as in `config.input.data`.
        pp_fn: preprocessing, as in `config.input.pp`.
        log: how often, e.g. `log_epochs=1`; also always at the last step.
        batch_size: examples in a global batch; None: that of training.
        prefix: put before its metrics' names; None: the block's name and "/".
        skip_errors: the share of the split that may be unreadable, and is left out; see `InputConfig`.
    """

    type: str
    data: dict[str, Any]
    pp_fn: str
    log: Duration
    batch_size: int | None = None
    prefix: str | None = None
    skip_errors: bool | float = False

    def __post_init__(self):
        error_share(self.skip_errors)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError("batch_size", f"must be at least 1, got {self.batch_size}")
        if self.log.value == 0:
            raise ConfigError(f"log_{self.log.unit}", "must be more than 0; an evaluator also runs at the last step")


def parse_evals(evals: Mapping[str, Mapping[str, Any]], path: str = "config.evals") -> dict[str, EvaluatorConfig]:
    """The checked settings of every evaluator, by name.

    Raises:
        ConfigError: names the block and field that cannot work.
    """
    configs = {}
    for name, block in evals.items():
        where = f"{path}.{name}"
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            raise ConfigError(f"{where}.type", f"required: {', '.join(EVALUATORS)}")
        config = parse(_module(block["type"], f"{where}.type").Config, block, where)
        datasets.check_source(config.data, f"{where}.data")
        builder.build(config.pp_fn, f"{where}.pp_fn")
        configs[name] = config
    return configs


def build(
    name: str, config: EvaluatorConfig, *, predict_fn: PredictFn, state_shapes: Any, sharding: NamedSharding,
    batch_size: int, num_classes: int, class_names: Sequence[str] | None = None, path: str = "config.evals",
) -> Any:
    """One evaluator, its data opened.

    Args:
        name: its name in `config.evals`.
        config: its settings.
        predict_fn: (train_state, images) → (logits, out).
        state_shapes: of the train state, to try `predict_fn` on.
        sharding: of a batch.
        batch_size: of training, for evaluators that name none of their own.
        num_classes: of the model.
        class_names: of the model, by which the labels of the data are brought to its numbers; None: not known.
        path: where the evaluators stand in the config, for errors.

    Raises:
        ConfigError: its data is not there, or is not what the model takes.
    """
    config = dataclasses.replace(config, batch_size=config.batch_size or batch_size,
                                 prefix=f"{name}/" if config.prefix is None else config.prefix)
    where = f"{path}.{name}"
    preprocess = builder.build(config.pp_fn, f"{where}.pp_fn")
    if preprocess.num_classes not in (None, num_classes):
        raise ConfigError(f"{where}.pp_fn", f"onehot has {preprocess.num_classes} classes, the model {num_classes}; "
                                            f"make it onehot({num_classes})")
    data = f"{where}.data"
    source = datasets.align(datasets.open_source(config.data, data), class_names, num_classes, data)
    for line in describe(data, source):
        logger.info("%s", line)
    spec = example_spec(source, preprocess, config.skip_errors)
    shape = check_example(preprocess, spec, num_classes, f"{where}.pp_fn")
    try:
        jax.eval_shape(predict_fn, state_shapes, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    except Exception as error:  # whatever the model says to images it was not made for
        raise ConfigError(f"{where}.pp_fn", f"the model cannot take its images, {shape}: they are not like those it "
                                            f"was trained on ({str(error).splitlines()[0][:120]})") from None
    return _module(config.type, where).Evaluator(
        predict_fn, config=config, source=source, preprocess=preprocess, sharding=sharding)


def measure(evaluator: Any, state: TrainState) -> dict[str, float]:
    """All metrics of an evaluator, and if an average of the parameters is kept, of that as well, under "ema/"."""
    found = {f"{evaluator.config.prefix}{metric}": value for metric, value in evaluator.run(state)}
    if state.ema is None:
        return found
    averaged = evaluator.run(state.replace(params=state.ema))
    return found | {f"{EMA}{evaluator.config.prefix}{metric}": value for metric, value in averaged}


def _module(kind: str, path: str) -> ModuleType:
    return importlib.import_module(EVALUATORS.pick(kind, path))
