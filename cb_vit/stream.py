"""What makes up the stream of batches: recorded in checkpoints, and compared where a run goes on and between hosts."""
from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from cb_vit import dist
from cb_vit import workdir as workdir_lib
from cb_vit.config import ConfigError
from cb_vit.datasets.contents import contents_of, report
from cb_vit.evaluators.common import sources_of
from cb_vit.experiment import Experiment

logger = logging.getLogger(__name__)
ORDER = ("batch_size", "repeats", "balance", "virtual_ranks")
STREAM = ("seed", "input.data", "input.pp", *(f"input.{name}" for name in ORDER))


def stream_of(run: Experiment) -> dict[str, Any]:
    """What makes up the stream of batches, as checkpoints keep it: a copy of the data elsewhere is the same."""
    settings, source = run.settings, run.pipeline.source
    data = {name: value for name, value in dataclasses.asdict(settings.input.data).items()
            if name not in ("root", "data_dir")}
    block = {name: getattr(settings.input, name) for name in ORDER}
    config = workdir_lib.flatten({"seed": settings.seed,
                                  "input": {**block, "data": data, "pp": settings.input.pp.text}})
    return {"config": config, "class_names": source.class_names and list(source.class_names),
            "examples": len(source), "fingerprint": contents_of(source).fingerprint}


def check_stream(run: Experiment, recorded: Mapping[str, Any] | None, workdir: str | os.PathLike) -> None:
    """Refuse to go on with other batches than the checkpoint's; tell of all else that has changed.

    Args:
        run: the run that would go on.
        recorded: result of `stream_of` that the checkpoint holds; None: it holds none, and the run is compared with
            what `config.json` and `run.json` say.
        workdir: folder of the run that saved the checkpoint.

    Raises:
        ConfigError: the batches are others, and `allow_changed_data` is not set.
    """
    now, config = stream_of(run), workdir_lib.read_config(workdir)
    if recorded:  # a setting that only one version has tells nothing of a change, unless its absence does
        recorded = {**recorded, "config": {"input.balance": 0.0} | recorded["config"]}
        both = recorded["config"].keys() & now["config"].keys()
        recorded, now = ({**one, "config": {key: one["config"][key] for key in both}} for one in (recorded, now))
    if recorded is None:
        logger.warning("the checkpoint does not say which data it was trained on: its files are not compared, only "
                       "what config.json and run.json of %s say", workdir)
        names, now = workdir_lib.recorded_classes(workdir), {**now, "config": _of_stream(run.settings.raw)}
        recorded = {"class_names": list(names)} if names else {}
        if config:
            recorded["config"] = _of_stream(config)
    for line in workdir_lib.check_stream(recorded, now, run.settings.allow_changed_data):
        logger.warning("the stream of batches changes: %s", line)
    for line in workdir_lib.changes(config, run.settings.raw) if config else ():
        logger.warning("changed since the last start: %s", line)


def _of_stream(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that make up the stream of batches, by dotted name."""
    return {key: value for key, value in workdir_lib.flatten(config).items()
            if any(key == name or key.startswith(f"{name}.") for name in STREAM)}


def check_hosts(run: Experiment, evals: Mapping[str, Any]) -> None:
    """Refuse data that is not the same on all hosts.

    Args:
        run: the run, whose training data is compared.
        evals: evaluators of the run by name, whose data is compared as well.

    Raises:
        ConfigError: the hosts differ; raised at the block of the data.
    """
    found = {"config.input.data": stream_of(run)} | {
        f"config.evals.{name}.{field}": [source.class_names, report(source)]
        for name, evaluator in evals.items() for field, source in sources_of(evaluator).items()}
    for path, what in found.items():
        if not dist.alike(json.dumps(what, sort_keys=True)):
            raise ConfigError(path, "is not the same on all hosts: names of classes, number of examples or files "
                                    "differ; copy it anew")
