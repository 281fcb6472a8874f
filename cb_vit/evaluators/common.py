"""What evaluators share: their settings, and building them from `config.evals`.

An evaluator is a module of this room with a `Config` and an `Evaluator`:

    Evaluator(predict_fn, *, config, pipeline, sharding), with `config` and `source` as attributes
    Evaluator.run(train_state) -> yields (metric name, value)

One that has more to show of its last run than numbers says so in `files() -> yields (file name, content)`, which is
asked on the first process alone, and stored by the caller. One that reads more data than `data` names it in
`Config.further`, and is given each as a `Pipeline` under that name, which it keeps as an attribute. One that has
something to refuse of the model has `check(logits, out)`, which is given the shapes of what `predict_fn` makes of one
image.

A module whose evaluator does not score the model's own classes says `NEEDS_CLASSES = False`: its labels are then the
numbers of its own data, whatever the model's head, and the model may have none.

`predict_fn(train_state, images, **options)` → (logits, out) is pure; evaluators jit it with their own arithmetic. The
options are those of the model's call, such as `attention`.
"""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cb_vit import datasets, dist, io
from cb_vit.config import ConfigError, Duration, Failure, Read, convert, parse, plain, under
from cb_vit.datasets.contents import Absent, describe
from cb_vit.datasets.core import SourceConfig
from cb_vit.input_pipeline import LoaderConfig, Pipeline, check_example, to_device
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess
from cb_vit.records import EMA
from cb_vit.registry import Registry
from cb_vit.skip_errors import Judge
from cb_vit.train_state import TrainState
from cb_vit.workdir import CONTENTS

logger = logging.getLogger(__name__)
EVALUATORS = Registry("evaluator", {name: f"cb_vit.evaluators.{name}" for name in (
    "classification", "mistakes", "calibration", "fewshot_lsr", "knn", "attack", "occlusion",
    "corruptions", "stored_corruptions", "attention_density")})
T = TypeVar("T")
PredictFn = Callable[..., tuple[jax.Array, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatorConfig(LoaderConfig):
    """What every block of `config.evals` may say; an evaluator's own `Config` adds to it.

    How its examples are loaded is said as in `config.input`; what is None is as there. `skip_errors` is the share of
    the split that may be unreadable, and is left out. A `__post_init__` of a `Config` calls that of this class.

    Attributes:
        type: kind of the evaluator, e.g. "classification".
        pp_fn: preprocessing of an example, as in `config.input.pp`.
        log: the time between two evaluations, e.g. `log_epochs=1`; there is always one at the last step.
        prefix: beginning of the names of its metrics; None: the block's name and "/".
        optional: whether the evaluator is left out, which is said, where its data is not there; what is damaged or of
            another form stays an error.
    """

    type: str
    pp_fn: Annotated[Preprocess, Read(str, builder.build)]
    log: Duration
    batch_size: int | None = None
    num_workers: int | None = None
    num_threads: int | None = None
    prefetch: int | None = None
    prefix: str | None = None
    optional: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.log.value == 0:
            raise ConfigError(f"log_{self.log.unit}", "must be more than 0; an evaluator also runs at the last step")

    @property
    def further(self) -> dict[str, SourceConfig]:
        """Settings of the data that is read beside `data`, by their names in the block."""
        return {}

    @property
    def needs_classes(self) -> bool:
        """Whether it scores the classes of the model's head; else it counts by those of its own data."""
        return getattr(_module(self.type, "type"), "NEEDS_CLASSES", True)


def check_folder(config: EvaluatorConfig) -> None:
    """Refuse a prefix that is no folder for the files of an evaluator, in that of the run.

    Raises:
        ConfigError: at "prefix".
    """
    if config.prefix is None:
        return
    first, *rest = config.prefix.removesuffix("/").split("/")
    plain = all(re.fullmatch(r"[\w-][\w.-]*", part) for part in (first, *rest))
    if not plain or first in CONTENTS:
        raise ConfigError("prefix", f"{config.prefix!r} is to be a folder of the run's own, for what is written: "
                                    f"take letters and digits, such as '{config.type}/'")


def have_one_name(values: Sequence[str | float]) -> bool:
    """Whether two of some settings would have the same name in that of a metric."""
    names = [value if isinstance(value, str) else f"{value:g}" for value in values]
    return len(set(names)) < len(names)


def read_evaluator(block: Any, path: str) -> EvaluatorConfig:
    """The checked settings of one evaluator, whose `type` says which keys there are.

    Raises:
        ConfigError: a setting cannot work; raised under `path`.
    """
    kind = plain(block).get("type") if isinstance(block, Mapping) else None
    if kind is None:
        raise ConfigError(f"{path}.type", f"required: {', '.join(EVALUATORS)}")
    config = parse(_module(convert(kind, str, f"{path}.type"), f"{path}.type").Config, block, path)
    for field, other in config.further.items():
        if other == config.data:
            raise ConfigError(f"{path}.{field}", "is the data that is measured, and nothing is to be learnt from that; "
                                                 "give other data")
    return config


def tell_absent(name: str, error: Absent) -> None:
    """Say that an optional evaluator is left out."""
    logger.warning("config.evals.%s is left out, as it is optional: %s", name, error)


def open_all(
    evals: Mapping[str, EvaluatorConfig], predict_fn: Callable[[EvaluatorConfig], PredictFn], *, state_shapes: Any,
    sharding: NamedSharding, training: LoaderConfig, num_classes: int, class_names: Sequence[str] | None = None,
    on_absent: Callable[[str, Absent], None] = tell_absent,
) -> dict[str, Any]:
    """Evaluators by name, their data opened; without optional ones whose data is not there, on whatever process.

    Args:
        evals: settings of each evaluator, by its name.
        predict_fn: function from an evaluator's settings to its function from (train_state, images) to (logits, out).
        state_shapes: shapes of the train state, to try `predict_fn` on.
        sharding: sharding of a global batch.
        training: the block `config.input`, for what an evaluator does not say of its own loading.
        num_classes: width of the model's head; 0: it has none.
        class_names: names of the model's classes, by which the labels of the data are brought to its numbers; None: not
            known.
        on_absent: function that is told of each optional evaluator that is left out: its name, and why.

    Raises:
        ConfigError: the data of an evaluator is not there, or not what the model takes; the model has no head to
            score; or two have one prefix.
    """
    for name, config in evals.items():
        if not num_classes and config.needs_classes:
            others = ", ".join(kind for kind in EVALUATORS if not getattr(_module(kind, ""), "NEEDS_CLASSES", True))
            raise ConfigError(f"config.evals.{name}.type", f"{config.type!r} scores classes of the model, which has no "
                                                           f"head; what needs none is {others}")
    opened = {}
    for name, config in evals.items():
        sources = _there(name, config, on_absent) if config.optional else None
        if sources is not None or not config.optional:
            opened[name] = _open(name, config, predict_fn(config), state_shapes, sharding, training, num_classes,
                                 class_names, sources)
    owners: dict[str, str] = {}
    for name, evaluator in opened.items():
        if (other := owners.setdefault(evaluator.config.prefix, name)) != name:
            raise ConfigError(f"config.evals.{name}.prefix", f"{evaluator.config.prefix!r} is that of {other} too: "
                                                             "their metrics would have the same names")
    return opened


def _there(name: str, config: EvaluatorConfig, on_absent: Callable[[str, Absent], None]
           ) -> dict[str, datasets.Source] | None:
    """The data of an optional evaluator; None: it is not there, for this process or another."""
    def look() -> dict[str, datasets.Source] | Absent:
        try:
            return open_sources(name, config)
        except Absent as error:
            return error

    found = dist.together(look)  # where it is damaged, all end
    if not dist.worst(isinstance(found, Absent)):
        return found
    if not isinstance(found, Absent):
        found = Absent(f"config.evals.{name}.data", "is there, but not for another process; put it where all can read")
    on_absent(name, found)
    return None


def _open(name: str, config: EvaluatorConfig, predict_fn: PredictFn, state_shapes: Any, sharding: NamedSharding,
          training: LoaderConfig, num_classes: int, class_names: Sequence[str] | None,
          sources: Mapping[str, datasets.Source] | None) -> Any:
    pipelines = open_pipelines(name, config, sharding, training, num_classes, class_names, sources)
    pipeline = pipelines.pop("data")
    path, (shape, _) = f"config.evals.{name}", pipeline.spec["image"]
    try:
        made = jax.eval_shape(predict_fn, state_shapes, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    except Exception as error:  # whatever the model says to images it was not made for
        raise ConfigError(f"{path}.pp_fn", f"the model cannot take its images, {shape}: they are not like those it "
                                           f"was trained on ({str(error).splitlines()[0][:120]})") from None
    with under(path):
        evaluator = _module(config.type, path).Evaluator(
            predict_fn, config=pipeline.config, pipeline=pipeline, sharding=sharding, **pipelines)
        if hasattr(evaluator, "check"):
            evaluator.check(*made)
    return evaluator


def open_sources(name: str, config: EvaluatorConfig) -> dict[str, datasets.Source]:
    """The sources of one evaluator: what it has in `further`, and "data".

    Args:
        name: name of the evaluator.
        config: its settings.

    Raises:
        Absent: there is no such data.
        ConfigError: the data is of another form.
    """
    blocks = {**config.further, "data": config.data}
    return {field: datasets.open_source(block, f"config.evals.{name}.{field}") for field, block in blocks.items()}


def open_pipelines(name: str, config: EvaluatorConfig, sharding: NamedSharding, training: LoaderConfig,
                   num_classes: int, class_names: Sequence[str] | None,
                   sources: Mapping[str, datasets.Source] | None = None) -> dict[str, Pipeline]:
    """The data of one evaluator, opened: "data", and what it has in `further`.

    The configs of the pipelines have all that the block leaves to `training`. The classes are those of the model, or if
    the evaluator needs none, those of the first of `further`, or of the data.

    Args:
        name: name of the evaluator.
        config: its settings.
        sharding, training, num_classes, class_names: as for `open_all`.
        sources: its data, from `open_sources`; None: to be opened.

    Raises:
        ConfigError: the data is not there, or not what the model takes.
    """
    path, preprocess = f"config.evals.{name}", config.pp_fn
    unsaid = {key: getattr(training, key) for key in ("batch_size", "num_workers", "num_threads", "prefetch")
              if getattr(config, key) is None}
    prefix = f"{name}/" if config.prefix is None else config.prefix
    with under(path):
        config = dataclasses.replace(config, prefix=prefix, **unsaid)
    blocks = {**config.further, "data": config.data}
    sources = open_sources(name, config) if sources is None else sources
    whose = "the model"
    if not config.needs_classes:
        first = next(iter(sources.values()))
        class_names, num_classes, whose = datasets.known_names(first), first.num_classes, f"the {next(iter(blocks))}"
    preprocess = preprocess.for_classes(num_classes)
    # Without a head to fit, more classes than there are do no harm.
    depth = preprocess.num_classes if preprocess.num_classes and not config.needs_classes else num_classes
    if preprocess.num_classes not in (None, depth) or depth < num_classes:
        raise ConfigError(f"{path}.pp_fn", f"onehot has {preprocess.num_classes} classes, {whose} {num_classes}; "
                                           f"make it onehot({num_classes})")
    pipelines = {}
    for field, source in sources.items():
        data = f"{path}.{field}"
        source = datasets.align(source, class_names, num_classes, data)
        for line in describe(data, source):
            logger.info("%s", line)
        pipelines[field] = Pipeline(dataclasses.replace(config, data=blocks[field]), source, preprocess,
                                    dist.local_rows(sharding, config.batch_size))
        check_example(preprocess, pipelines[field].spec, depth, f"{path}.pp_fn")
    shapes = {field: pipeline.spec["image"][0] for field, pipeline in pipelines.items()}
    for field, shape in shapes.items():
        if shape != shapes["data"]:
            raise ConfigError(f"{path}.pp_fn", f"makes images of {shape} of {field} and of {shapes['data']} of data; "
                                               "resize them to one size")
    return pipelines


def measure(evaluator: Any, state: TrainState, folder: str | os.PathLike | None = None) -> dict[str, float]:
    """All metrics of an evaluator, and if an average of the parameters is kept, of that as well, under "ema/".

    Args:
        evaluator: what measures.
        state: the train state.
        folder: where its files go, into a folder called as its metrics are; None: they are not made.
    """
    found = _measure(evaluator, state, evaluator.config.prefix, folder)
    if state.ema is None:
        return found
    return found | _measure(evaluator, state.replace(params=state.ema), f"{EMA}{evaluator.config.prefix}", folder)


def _measure(evaluator: Any, state: TrainState, prefix: str, folder: str | os.PathLike | None) -> dict[str, float]:
    found = {f"{prefix}{metric}": value for metric, value in evaluator.run(state)}
    if folder is not None and has_files(evaluator) and jax.process_index() == 0:
        io.try_to_write(io.as_path(folder) / prefix, evaluator.files())
    return found


def sources_of(evaluator: Any) -> dict[str, Any]:
    """The sources that an evaluator reads: "data", and what it has in `further`."""
    further = {field: getattr(evaluator, field) for field in evaluator.config.further}
    return {"data": evaluator.source} | {field: pipeline.source for field, pipeline in further.items()}


def has_files(evaluator: Any) -> bool:
    """Whether an evaluator has more to show than numbers."""
    return hasattr(evaluator, "files")


def check_finite(finite: bool) -> None:
    """Refuse what a model gives where it is no number: whatever is fitted to it would be none either.

    Raises:
        Failure: it is not finite.
    """
    if not finite:
        raise Failure("the model's output is not finite; are these weights whole?")


def over_batches(
    function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], pipeline: Pipeline, sharding: NamedSharding,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """What a function makes of each batch of an evaluator, on the host, the next batch being under way.

    Args:
        function: function of a global batch; a part of what it returns is "masked", the number of rows without an
            example, which are judged and left out here.
        pipeline: loader of the evaluator's data.
        sharding: sharding of a global batch.
        seed: seed of what is drawn for each example.

    Raises:
        DataError: more examples cannot be read than `skip_errors` allows.
    """
    config = pipeline.config
    batches = to_device(pipeline.evaluate(seed), pipeline.rows, sharding, config.batch_size)
    judge = Judge(pipeline, f"skip_errors of the evaluator {config.prefix!r}")
    with contextlib.closing(batches):
        for step, values in enumerate(_one_behind(function(batch) for batch in batches), 1):
            values = jax.device_get(values)
            judge.add(step, int(values.pop("masked")))
            yield values


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """The same items, each once the next is under way: the device is never waited for."""
    items = iter(items)
    for previous in items:
        for item in items:
            yield previous
            previous = item
        yield previous


def _module(kind: str, path: str) -> ModuleType:
    return importlib.import_module(EVALUATORS.pick(kind, path))
