"""Checkpoints, with Orbax behind this one door.

A checkpoint of step k is a folder `checkpoints/k` with the items `params`, `opt` unless empty, `ema` if kept, and
`meta`. Arrays are stored in loop layout (one entry a block) whatever the model runs. `meta` lists their names, shapes,
dtypes and checksums: names, shapes and dtypes tell a checkpoint of another model from a damaged one before
anything is read, and checksums are verified afterwards. Saving is asynchronous and atomic.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from cb_vit import damage, dist, io, retry
from cb_vit.checkpoint_arrays import checksums, describe, in_loop, in_loop_layout, shardings
from cb_vit.checkpoint_reading import FORMAT, Mismatch, Reader, check_fit, digest, handlers
from cb_vit.config import ConfigError, Failure
from cb_vit.damage import Damaged
from cb_vit.models.common import to_scan
from cb_vit.registry import Registry
from cb_vit.train_state import TrainState
from cb_vit.tree import unflatten_names

__all__ = ["Checkpointer", "KeepBest", "Mismatch", "Params", "in_loop_layout", "saved_steps"]
logger = logging.getLogger(__name__)
Tree = Any
Params = Literal["raw", "ema"]  # the parameters of a run, or their moving average
_ITEMS = Registry("kind of parameters", {"raw": "params", "ema": "ema"})


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """The block `config.keep_best`: keep the checkpoints with the best value of a metric.

    Attributes:
        metric: name of the metric, e.g. "val/prec@1"; a checkpoint is saved whenever its evaluator has run.
        n: number of checkpoints to keep.
        mode: whether the largest value ("max") or the smallest ("min") is best.
    """

    metric: str = "val/prec@1"
    n: int = 1
    mode: Literal["max", "min"] = "max"

    def __post_init__(self):
        if self.n < 1:
            raise ConfigError("n", f"must be at least 1, got {self.n}")


class Checkpointer:
    """The checkpoints of one run.

    Args:
        directory: the folder `checkpoints` of a workdir.
        keep_last: number of the newest checkpoints to keep.
        keep_every: divisor of the steps whose checkpoints are kept as well; None: none are.
        keep_best: the rule by which the best checkpoints are kept as well; None: none are.
        read_only: whether nothing may be changed, not even what a killed run left half-written or a damaged checkpoint.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 1, keep_every: int | None = None,
                 keep_best: KeepBest | None = None, read_only: bool = False):
        self.directory, self._read_only = io.as_path(directory), read_only
        self._reader = Reader(self.directory)
        self._best = _Best(keep_best) if keep_best else None
        policies: list[Any] = [preserve.LatestN(keep_last)]
        if keep_every:
            policies.append(preserve.EveryNSteps(keep_every))
        if self._best:
            policies.append(self._best)
        # Before Orbax looks, which takes a folder that cannot be listed for an empty one.
        steps = self._reader.steps()
        if self._best:
            self._judge(self._best, steps)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies), create=not read_only,
            cleanup_tmp_directories=not read_only, read_only=read_only)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers())
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._reader.compare(steps, self._manager)
            stack.pop_all()

    def _judge(self, best: _Best, steps: list[int]) -> None:
        for step in steps:
            try:
                best.judge(step, self._read_meta(step)["metrics"])
            except Damaged as error:
                logger.warning("keep_best cannot judge checkpoint %d, and so keeps it: it is damaged (%s)", step, error)
                best.spare(step)

    def _read_meta(self, step: int) -> dict[str, Any]:
        return self._reader.patiently(step, lambda: self._reader.meta(step))

    def save(self, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
        """Begin to save `state` under its step; returns once the devices may go on.

        Args:
            state: the state to save; the caller has seen that it is finite.
            meta: JSON values to store beside the state.
            metrics: the metrics of this step, stored too, by which `keep_best` judges; None: there are none.

        Returns:
            Whether there was something to save: a step that is there already is not saved again.

        Raises:
            CannotWrite: the storage fails.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self._check_folder()
        arrays = in_loop(state.arrays)
        described = zip(describe(arrays).items(), checksums(arrays), strict=True)
        listed = {name: [*what, value] for (name, what), value in described}
        # Through JSON and back, so that the digest is of what a reader will parse: tuples become lists.
        meta = json.loads(json.dumps(
            {**meta, "format": FORMAT, "step": step, "metrics": dict(metrics or {}), "arrays": listed}))
        if self._best and metrics:
            self._best.judge(step, metrics)
        with self._saving():
            # When to save is the train loop's decision; unforced, Orbax would decide once more by its own policy.
            self._manager.save(step, force=True, args=ocp.args.Composite(
                **{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()},
                meta=ocp.args.JsonSave({**meta, "digest": digest(meta)})))
        return True

    def check(self) -> None:
        """Raise what has gone wrong in the background so far; waits for nothing.

        Raises:
            CannotWrite: the storage has failed.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def _check_folder(self) -> None:
        """Refuse to save where the run's folder was: Orbax would make it anew, and nobody would look there."""
        if io.is_local(self.directory) and not io.exists(self.directory):
            raise io.cannot_write(self.directory, FileNotFoundError(errno.ENOENT, ""))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Whatever Orbax and TensorStore make of storage that fails, as an `io.CannotWrite`."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):  # of the devices, not of the storage
            raise
        except Exception as error:
            raise io.cannot_write(self.directory, error) from None

    def restore_latest(self, like: TrainState, scan: bool) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest sound checkpoint, each leaf straight onto its devices; None if there is none at all.

        Newer ones that are damaged are set aside, with a warning, once it is read.

        Args:
            like: shapes of the state, with shardings, in the model's own layout.
            scan: whether that layout is the scanned one.

        Returns:
            The state and the checkpoint's notes.

        Raises:
            Mismatch: the checkpoint is sound but of another model or optimiser.
            Unreadable: a checkpoint cannot be read, and nothing shows that it is damaged.
            Failure: all checkpoints are damaged, or one that may not be set aside is.
        """
        damaged: dict[int, Damaged] = {}
        while (step := self._newest_before(min(damaged, default=math.inf))) >= 0:
            try:
                found = self._reader.patiently(step, functools.partial(self._restore, step, like, scan))
            except Damaged as error:
                damaged[step] = error
                if self._read_only:
                    break
                continue
            # Only now that a sound one is read: where none is, nothing may be moved. They must go, or Orbax would still
            # count them as the latest, and their steps could not be saved again.
            for broken, error in damaged.items():
                self._set_aside(broken, error)
            return found
        if damaged:
            raise Failure(self._lost(damaged))
        return None

    def _newest_before(self, limit: float) -> int:
        """The newest step before `limit` that any process has found; -1: none."""
        return dist.worst(max((step for step in self._manager.all_steps() if step < limit), default=-1))

    def _restore(self, step: int, like: TrainState, scan: bool) -> tuple[TrainState, dict[str, Any]]:
        wanted = like.arrays
        target = in_loop_layout(wanted)
        meta = self._reader.meta(step)
        check_fit(f"checkpoint {step} in {self.directory}", meta, target)
        arrays = self._reader.arrays(step, meta, target)
        # Read in loop layout, as it is stored; only what the model runs is stacked, on the devices.
        if scan:
            arrays = jax.jit(to_scan, out_shardings=shardings(wanted))(arrays)
        scalar = lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)  # noqa: E731
        # Not stored: the folder's name says the step, and only states that were finite are saved.
        return TrainState(scalar(step, like.step), arrays["params"], arrays.get("opt", like.opt),
                          scalar(True, like.finite), arrays.get("ema")), meta

    def params_shapes(self, step: int | None = None, params: Params = "raw") -> tuple[int, Tree]:
        """What parameters a checkpoint holds, whatever their model; reads no arrays.

        Args:
            step: the step of the checkpoint; None: the newest.
            params: "raw" for the parameters, "ema" for their moving average.

        Returns:
            The step, and shapes and dtypes of its parameters in loop layout.

        Raises:
            ConfigError: there is no such checkpoint, or it has no such parameters, or it is damaged.
            Unreadable: the checkpoint cannot be read.
        """
        item, steps = _ITEMS.pick(params, "params"), sorted(self._manager.all_steps())
        if not steps or step not in (None, *steps):
            held = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
            raise ConfigError("checkpoint", f"{self.directory} holds {held}" + f", none of step {step}" * bool(steps))
        step = steps[-1] if step is None else step
        with self._naming_damage(step):
            arrays = self._read_meta(step)["arrays"]
        named = {name.removeprefix(f"{item}/"): jax.ShapeDtypeStruct(shape, dtype)
                 for name, (shape, dtype, _) in arrays.items() if name.startswith(f"{item}/")}
        if not named:
            raise ConfigError("checkpoint", f"step {step} in {self.directory} has no {item!r}; its run kept no average")
        return step, unflatten_names(named)

    def restore_params(self, step: int, like: Tree, params: Params = "raw") -> Tree:
        """The parameters of a checkpoint, each leaf straight onto its devices, checksums verified.

        Args:
            step: the step of the checkpoint.
            like: shapes of the parameters, as `params_shapes` gives them, with shardings.
            params: "raw" for the parameters, "ema" for their moving average.

        Raises:
            ConfigError: the checkpoint is damaged.
            Unreadable: the checkpoint cannot be read.
        """
        item = _ITEMS.pick(params, "params")
        with self._naming_damage(step):
            read = lambda: self._reader.arrays(step, self._reader.meta(step), {item: like})  # noqa: E731
            return self._reader.patiently(step, read)[item]

    @contextlib.contextmanager
    def _naming_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except Damaged as error:
            raise ConfigError("checkpoint", f"step {step} in {self.directory} is damaged ({error}); "
                                            "give another, as WORKDIR@STEP") from None

    def _set_aside(self, step: int, error: Damaged) -> None:
        target = self._free(str(step))
        logger.warning("checkpoint %d is damaged (%s); it is set aside as %s, falling back to the one before", step,
                       error, target)

        def move() -> None:
            # One process moves; the others wait in `together`, so that none of them looks at a folder on its way.
            if jax.process_index() == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._reader.folder(step).rename(target)

        try:
            dist.together(move)
        except (ConfigError, Failure):
            raise
        except Exception as reason:  # of whatever library moves things there
            raise Failure(f"checkpoint {step} in {self.directory} is damaged ({error}) and cannot be moved to {target} "
                          f"({retry.reason(reason)}); see to that folder") from None
        self._manager.reload()  # Orbax keeps a list of its own

    def _lost(self, damaged: Mapping[int, Damaged]) -> str:
        said = "; ".join(f"step {step}: {error}" for step, error in itertools.islice(damaged.items(), 3))
        if self._read_only:
            what, source = "the newest checkpoint in {} is damaged", self._reader.folder(*damaged)
        else:
            what, source = "no checkpoint in {} is sound", self.directory
        return (f"{what.format(self.directory)} ({said}); nothing is changed. To do without, set aside what is "
                f"damaged: {damage.move_command(source, self._free(source.name))}")

    def _free(self, name: str) -> epath.Path:
        # Outside of `checkpoints`, where Orbax would take a folder called by a number for a checkpoint.
        aside = self.directory.parent / "damaged_checkpoints"
        taken = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        return next(path for path in map(aside.__truediv__, taken) if not io.exists(path))

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None: there is none."""
        return self._manager.latest_step()

    def last_good(self) -> str:
        """The newest complete checkpoint, in words for an error; of a folder that has gone, the newest it had."""
        steps = saved_steps(self.directory) or self._manager.all_steps()
        return f"the last good checkpoint is step {max(steps)} in {self.directory}" if steps else \
            "there is no checkpoint yet"

    def reached_preemption(self, step: int) -> bool:
        """Whether a process was told to end, so that all are to save this step and end.

        Orbax learns of a SIGTERM only after `jax.distributed.initialize()`. All processes must ask at the same steps.

        Args:
            step: number of completed steps.
        """
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CannotWrite: the storage has failed in the background.
        """
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder, also where the wait ends in an error."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # what went wrong has been told
                self._manager.close()


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the complete checkpoints that a folder holds, ascending; none where it cannot be read."""
    try:
        return sorted(ocp.utils.checkpoint_steps(io.as_path(directory)))
    except Exception:  # whatever storage that has gone makes of it
        return []


class _Best(preserve.PreservationPolicy):
    """Keeps the best checkpoints; unlike Orbax's own `BestN` it knows those of earlier processes."""

    def __init__(self, keep: KeepBest):
        self._keep, self._scores, self._spared = keep, {}, set()

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the score of a checkpoint, if it has one."""
        score = metrics.get(self._keep.metric)
        if score is None and metrics:
            logger.warning("keep_best cannot judge checkpoint %d: %s is not among its metrics, %s", step,
                           self._keep.metric, ", ".join(metrics))
        if score is not None and not math.isnan(score):
            self._scores[step] = score

    def spare(self, step: int) -> None:
        """Keep a checkpoint that cannot be judged."""
        self._spared.add(step)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For each checkpoint, whether it is, or may be, among the best."""
        del context
        # Those without a score are none of the best, but another policy may keep them.
        judged = [info.step for info in checkpoints if info.step in self._scores]
        best = sorted(judged, key=self._scores.__getitem__, reverse=self._keep.mode == "max")[:self._keep.n]
        return [info.step in best or info.step in self._spared for info in checkpoints]
