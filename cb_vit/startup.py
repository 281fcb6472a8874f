"""What stands between a config and the first step: the experiment, its evaluators, and the state it begins with."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import NamedSharding

from cb_vit import datasets, dist, experiment, io
from cb_vit import workdir as workdir_lib
from cb_vit.checkpoint import Checkpointer
from cb_vit.checkpoint_reading import Mismatch, Reader
from cb_vit.config import ConfigError
from cb_vit.damage import Damaged
from cb_vit.datasets.contents import contents_of, describe, report
from cb_vit.evaluators import common as evaluators
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn
from cb_vit.experiment import Experiment
from cb_vit.input_pipeline import check_workers
from cb_vit.model_init import begin_from, check_fit, open_init
from cb_vit.settings import Settings
from cb_vit.train_state import TrainState

logger = logging.getLogger(__name__)
# The settings that make up the stream of batches.
STREAM = ("seed", "input.data", *(f"input.{name}" for name in ("pp", "batch_size", "repeats", "virtual_ranks")))
# And those that make up the arrays of a train state.
STATE = ("model_name", "model", "num_classes", "optax_name", "optax", "schedule", "ema")


def build(settings: Settings, workdir: str | os.PathLike) -> Experiment:
    """The experiment, and a look at what it would begin from, before anything is written.

    Raises:
        ConfigError: see `experiment.build`; or there is nothing where `config.resume` or `config.model_init` points to,
            or parameters of another model.
    """
    cfg, weights = settings.train, None
    _check_addresses(settings)
    if Reader(io.as_path(workdir) / "checkpoints").steps():
        begun = workdir
    elif begun := cfg.resume:
        resume_folder(begun)
    if begun:
        known, settings = recorded_classes(begun), _with_its_norms(settings, begun)
    else:
        weights = open_init(cfg) if cfg.model_init else None
        known = weights and weights.class_names
    run = experiment.build(settings, known_classes=known)
    check_workers(cfg.input, run.example_spec, len(run.pipeline.rows))
    for line in describe("config.input.data", run.pipeline.source):
        logger.info("%s", line)
    if weights:
        check_fit(run, weights)
    return run


def recorded_classes(workdir: str | os.PathLike) -> tuple[str, ...] | None:
    """What the classes of the run in `workdir` are called, as its newest checkpoint says, or else `run.json`.

    Returns:
        Names, one a class of the head; None: not known.
    """
    for recorded in _recorded(workdir):
        if stream := recorded.get("stream"):
            return stream["class_names"] and tuple(stream["class_names"])
    return dist.together(lambda: _classes_in_notes(workdir))


def _recorded(workdir: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """What is noted in the checkpoints of a run, the newest first."""
    reader = Reader(io.as_path(workdir) / "checkpoints")
    for step in reversed(reader.steps()):
        with contextlib.suppress(Damaged):  # which is told where it is restored
            yield reader.patiently(step, functools.partial(reader.meta, step))


def _with_its_norms(settings: Settings, workdir: str | os.PathLike) -> Settings:
    """`settings`, in which LAMB's norms are those that the run in `workdir` has had, unless they say otherwise.

    Checkpoints from before there was a choice do not say which; they had one a parameter.
    """
    if not settings.train.lamb or settings.train.lamb_fused_qkv is not None:
        return settings
    fused = next(_recorded(workdir), {}).get("lamb_fused_qkv", False)
    if not fused:
        logger.info("config.lamb_fused_qkv: this run keeps LAMB's norms of query, key and value apart, as it began; "
                    "new runs have one over the three, as timm: --config.lamb_fused_qkv=True")
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, lamb_fused_qkv=fused))


def _classes_in_notes(workdir: str | os.PathLike) -> tuple[str, ...] | None:
    notes = workdir_lib.read_run(workdir)
    return notes and workdir_lib.class_names(notes, workdir)


def _check_addresses(settings: Settings) -> None:
    """Refuse what lies in a bucket that nothing here can open, before anything is fetched from elsewhere.

    Raises:
        ConfigError: names the setting.
    """
    cfg = settings.train
    paths = {"resume": cfg.resume, "model_init": cfg.model_init, "input.data.data_dir": cfg.input.data.get("data_dir"),
             "distillation.teacher": cfg.distillation and cfg.distillation.teacher,
             **{f"evals.{name}.data.data_dir": config.data.get("data_dir") for name, config in settings.evals.items()}}
    for field, path in paths.items():
        if path and not path.startswith("hf://"):
            io.check_address(path, f"config.{field}")


def build_evaluators(run: Experiment, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The evaluators of `config.evals`, by name, their data opened.

    Args:
        run: whose they are.
        class_names: what the classes of its head were called in training; None: as the data here calls them.

    Raises:
        ConfigError: an evaluator that cannot work.
    """
    evals = open_evaluators(run.settings, lambda config: run.predict, run.shapes, run.batch_sharding, run.num_classes,
                            class_names or run.class_names)
    prefixes = [evaluator.config.prefix for evaluator in evals.values()]
    best = run.cfg.keep_best
    known = [*prefixes, *(f"{evaluators.EMA}{prefix}" for prefix in prefixes if run.cfg.ema)]
    if best and not best.metric.startswith(tuple(known)):
        listed = ", ".join(map(repr, known)) or "(config.evals is empty)"
        raise ConfigError("config.keep_best.metric", f"{best.metric!r} is of no evaluator; names of their metrics "
                                                     f"begin with {listed}")
    return evals


def open_evaluators(
    settings: Settings, predict_fn: Callable[[EvaluatorConfig], PredictFn], state_shapes: TrainState,
    sharding: NamedSharding, num_classes: int, class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The evaluators of any model, by name, their data opened.

    Args:
        settings: whose `evals` they are.
        predict_fn: settings of an evaluator → its (train_state, images) → (logits, out).
        state_shapes: of the train state.
        sharding: of a batch.
        num_classes: of the model.
        class_names: of the model; None: not known.

    Raises:
        ConfigError: an evaluator that cannot work.
    """
    evals = {name: evaluators.build(name, config, predict_fn=predict_fn(config), state_shapes=state_shapes,
                                    sharding=sharding, batch_size=settings.train.input.batch_size,
                                    num_classes=num_classes, class_names=class_names)
             for name, config in settings.evals.items()}
    owners: dict[str, str] = {}
    for name, evaluator in evals.items():
        if (other := owners.setdefault(evaluator.config.prefix, name)) != name:
            raise ConfigError(f"config.evals.{name}.prefix", f"{evaluator.config.prefix!r} is that of {other} too: "
                                                             "their metrics would have the same names")
    return evals


def restore_or_create(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]]:
    """The state a run begins with, and the notes beside it.

    In this order: own workdir, `config.resume`, `config.model_init`, scratch.

    Raises:
        ConfigError: where the run should go on, it would do so with other data, with another model, or past its end.
    """
    if restored := _restore(run, workdir, checkpointer):
        return restored
    if run.cfg.resume:
        directory = resume_folder(run.cfg.resume)
        with contextlib.closing(Checkpointer(directory, read_only=True)) as other:
            if restored := _restore(run, run.cfg.resume, other):
                return restored
        raise ConfigError("config.resume", f"{directory} holds no checkpoint; give the workdir of a run that has one")
    if run.cfg.model_init:
        return begin_from(run, open_init(run.cfg))
    return run.create_state(), {}


def _restore(
    run: Experiment, workdir: str | os.PathLike, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any]] | None:
    if checkpointer.latest_step() is None:
        return None
    with telling_settings(run.settings, workdir):
        restored = checkpointer.restore_latest(run.shapes, run.scan)
    if restored is None:
        return None
    step = int(restored[0].step)
    dist.together(lambda: _check_stream(run, restored[1].get("stream"), workdir))
    if step > run.total_steps:
        raise ConfigError(f"config.total_{run.cfg.total.unit}", f"the run ends at step {run.total_steps}, but the "
                          f"checkpoint in {checkpointer.directory} is of step {step}; use another workdir")
    logger.info("resumed from step %d of %s", step, checkpointer.directory)
    return restored


@contextlib.contextmanager
def telling_settings(settings: Settings, workdir: str | os.PathLike) -> Iterator[None]:
    """A `Mismatch` raised inside begins with what the run in `workdir` has set otherwise."""
    try:
        yield
    except Mismatch as error:
        before = workdir_lib.read_config(workdir) or {}
        told = [f"config.{key} is {was} there and {now} here"
                for key, was, now in workdir_lib.differences(_of_state(before), _of_state(settings.raw))]
        raise Mismatch(error.path, ": ".join(filter(None, (", ".join(told), error.message)))) from None


def _of_state(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config the settings that make up the arrays of a train state."""
    return {key: value for key, value in config.items() if key in STATE}


def stream(run: Experiment) -> dict[str, Any]:
    """What makes up the stream of batches, as checkpoints keep it: a copy of the data elsewhere is the same."""
    cfg, source = run.cfg, run.pipeline.source
    data = dataclasses.asdict(datasets.check_source(cfg.input.data, "config.input.data"))
    config = dataclasses.asdict(cfg)
    config["input"]["data"] = {name: value for name, value in data.items() if name not in ("root", "data_dir")}
    config = _of_stream(config)
    return {"config": config, "class_names": source.class_names and list(source.class_names),
            "examples": len(source), "fingerprint": contents_of(source).fingerprint}


def _check_stream(run: Experiment, recorded: Mapping[str, Any] | None, workdir: str | os.PathLike) -> None:
    """Refuse to go on with other batches than the checkpoint's; tell of all else that has changed.

    Args:
        run: that would go on.
        recorded: `stream` of the run when it was saved; None: by a version that kept no record in checkpoints, of which
            `config.json` and `run.json` say what they can.
        workdir: of the checkpoint.
    """
    now, config = stream(run), workdir_lib.read_config(workdir)
    if recorded:  # a setting that only one version has tells nothing of a change
        both = recorded["config"].keys() & now["config"].keys()
        recorded, now = ({**one, "config": {key: one["config"][key] for key in both}} for one in (recorded, now))
    if recorded is None:
        logger.warning("the checkpoint does not say which data it was trained on: its files are not compared, only "
                       "what config.json and run.json of %s say", workdir)
        names, now = _classes_in_notes(workdir), {**now, "config": _of_stream(run.settings.raw)}
        recorded = {"class_names": list(names)} if names else {}
        if config:
            recorded["config"] = _of_stream(config)
    for line in workdir_lib.check_stream(recorded, now, run.cfg.allow_changed_data):
        logger.warning("the stream of batches changes: %s", line)
    for line in workdir_lib.changes(config, run.settings.raw) if config else ():
        logger.warning("changed since the last start: %s", line)


def _of_stream(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config the settings that make up the stream of batches, by dotted name."""
    return {key: value for key, value in workdir_lib.flatten(config).items()
            if any(key == name or key.startswith(f"{name}.") for name in STREAM)}


def resume_folder(workdir: str) -> epath.Path:
    """The checkpoints of `config.resume`.

    Raises:
        ConfigError: there are none.
    """
    folder = io.as_path(workdir) / "checkpoints"
    if not io.exists(folder):
        raise ConfigError("config.resume", f"{folder} does not exist; give the workdir of a run")
    return folder


def run_notes(run: Experiment, evals: Mapping[str, Any], model_init: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `run.json` says of a run; `model_init`: where its first parameters came from."""
    sources = {"train": run.pipeline.source, **{name: evaluator.source for name, evaluator in evals.items()}}
    return workdir_lib.run_notes(
        run.cfg.model_name, run.settings.model, run.num_classes, run.class_names, run.example_spec["image"][0],
        run.cfg.input.pp, pp_evals={name: config.pp_fn for name, config in run.settings.evals.items()},
        total_steps=run.total_steps, model_init=model_init, data={name: report(it) for name, it in sources.items()})


def check_hosts(run: Experiment, evals: Mapping[str, Any]) -> None:
    """Refuse data that is not the same on all hosts.

    Raises:
        ConfigError: names the block of the data.
    """
    found = {"config.input.data": stream(run)} | {
        f"config.evals.{name}.data": [evaluator.source.class_names, report(evaluator.source)]
        for name, evaluator in evals.items()}
    for path, what in found.items():
        if not dist.alike(json.dumps(what, sort_keys=True)):
            raise ConfigError(path, "is not the same on all hosts: names of classes, number of examples or files "
                                    "differ; copy it anew")


def open_checkpoints(run: Experiment, workdir: str | os.PathLike) -> Checkpointer:
    """The checkpoints of a run's own workdir, kept as its config says."""
    cfg = run.cfg
    return Checkpointer(io.as_path(workdir) / "checkpoints", keep_last=cfg.keep_last,
                        keep_every=run.steps(cfg.keep_ckpt, "keep_ckpt"), keep_best=cfg.keep_best)
