"""Checkpoints, with Orbax behind this one door.

A checkpoint of step k is a folder `checkpoints/k` with three items: `params`, `opt` and `meta`. Arrays
are stored in loop layout (one entry a block) whatever the model runs, each with a checksum in `meta`
that is verified when it is restored. Saving is asynchronous and atomic.
"""
from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from cb_vit import io
from cb_vit.config import ConfigError
from cb_vit.models.common import to_loop, to_scan
from cb_vit.train_state import TrainState
from cb_vit.tree import flatten_with_names, names

logger = logging.getLogger(__name__)
Tree = Any
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """The block `config.keep_best`: keep the checkpoints with the best value of a metric.

    Attributes:
        metric: e.g. "val/prec@1"; judged at steps that are both evaluated and saved.
        n: how many.
        mode: whether the largest or the smallest is best.
    """

    metric: str = "val/prec@1"
    n: int = 1
    mode: Literal["max", "min"] = "max"


class Mismatch(ConfigError):
    """A sound checkpoint that holds another model or optimiser than the config describes."""


class Checkpointer:
    """The checkpoints of one run.

    Args:
        directory: the folder `checkpoints` of a workdir.
        keep_last: newest checkpoints to keep.
        keep_every: also keep those of steps divisible by this.
        keep_best: also keep the best.
        read_only: change nothing, not even what a killed run left half-written or a damaged checkpoint.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 1, keep_every: int | None = None,
                 keep_best: KeepBest | None = None, read_only: bool = False):
        self.directory, self._read_only = io.as_path(directory), read_only
        policies: list[Any] = [preserve.LatestN(keep_last)]
        if keep_every:
            policies.append(preserve.EveryNSteps(keep_every))
        if keep_best:
            policies.append(preserve.BestN(
                get_metric_fn=lambda metrics: metrics[keep_best.metric], reverse=keep_best.mode == "min",
                n=keep_best.n, keep_checkpoints_without_metrics=False))
        self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies), create=not read_only,
            cleanup_tmp_directories=not read_only, read_only=read_only))

    def save(self, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
        """Begin to save `state` under its step; returns once the devices may go on.

        Args:
            state: must be finite; the caller has checked.
            meta: JSON values to store beside it.
            metrics: of this step, for `keep_best`.

        Returns:
            Whether there was something to save: a step that is there already is not saved again.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        arrays = {"params": to_loop(state.params), "opt": to_loop(state.opt)}
        sums = np.asarray(_checksums(jax.tree.leaves(arrays))).tolist()
        meta = {**meta, "format": FORMAT, "step": step, "checksums": dict(zip(names(arrays), sums, strict=True))}
        self._manager.save(step, args=ocp.args.Composite(
            params=ocp.args.PyTreeSave(arrays["params"]), opt=ocp.args.PyTreeSave(arrays["opt"]),
            meta=ocp.args.JsonSave(meta)), metrics=dict(metrics) if metrics else None, force=True)
        return True

    def restore_latest(self, like: TrainState, scan: bool) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest sound checkpoint, each leaf straight onto its devices; None if there is none.

        A damaged one is set aside, with a warning, and the one before it is tried.

        Args:
            like: shapes of the state, with shardings, in the model's own layout.
            scan: whether that layout is the scanned one.

        Raises:
            Mismatch: the checkpoint is sound but of another model or optimiser.
        """
        while (step := self._manager.latest_step()) is not None:
            result, error = None, None
            try:
                result = self._restore(step, like, scan)
            except Mismatch:
                raise
            except Exception as reason:  # whatever a broken file makes the readers raise
                error = reason
            if not _anywhere(error is not None):
                return result
            if self._read_only:
                raise ConfigError("checkpoint", f"step {step} in {self.directory} cannot be read: {error}")
            self._set_aside(step, error)
        return None

    def _restore(self, step: int, like: TrainState, scan: bool) -> tuple[TrainState, dict[str, Any]]:
        target = jax.eval_shape(to_loop, {"params": like.params, "opt": like.opt}) if scan else \
            {"params": like.params, "opt": like.opt}
        target = _with_loop_shardings(target, {"params": like.params, "opt": like.opt}) if scan else target
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        self._check_names(step, meta["checksums"], target)
        restored = self._manager.restore(step, args=ocp.args.Composite(**{
            item: ocp.args.PyTreeRestore(
                target[item], restore_args=ocp.checkpoint_utils.construct_restore_args(target[item]))
            for item in ("params", "opt")}))
        arrays = {item: restored[item] for item in ("params", "opt")}
        self._check_shapes(step, arrays, target)
        sums = np.asarray(_checksums(jax.tree.leaves(arrays))).tolist()
        for (name, _), value in zip(flatten_with_names(arrays)[0], sums, strict=True):
            if meta["checksums"][name] != value:
                raise ValueError(f"checksum of {name} does not match")
        if scan:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, {"params": like.params, "opt": like.opt})
            arrays = jax.jit(to_scan, out_shardings=shardings)(arrays)
        scalar = lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)  # noqa: E731
        return TrainState(scalar(step, like.step), arrays["params"], arrays["opt"], scalar(True, like.finite)), meta

    def _check_names(self, step: int, saved: Mapping[str, int], target: Tree) -> None:
        missing = sorted(set(names(target)) - set(saved))
        extra = sorted(set(saved) - set(names(target)))
        if missing or extra:
            what = [f"{title} {', '.join(some[:3])}{' …' if len(some) > 3 else ''}"
                    for title, some in (("lacks", missing), ("has besides", extra)) if some]
            raise Mismatch("workdir", f"checkpoint {step} in {self.directory} {' and '.join(what)}: it is of another "
                                      "model or optimiser; use another workdir, or the config it was made with")

    def _check_shapes(self, step: int, arrays: Tree, target: Tree) -> None:
        for (name, array), (_, leaf) in zip(flatten_with_names(arrays)[0], flatten_with_names(target)[0], strict=True):
            if array.shape != leaf.shape:
                raise Mismatch("workdir", f"{name} is {array.shape} in checkpoint {step} of {self.directory} and "
                                          f"{leaf.shape} in this config; use another workdir")

    def _set_aside(self, step: int, error: Exception | None) -> None:
        aside = self.directory.parent / "damaged_checkpoints"
        target = aside / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        logger.warning("checkpoint %d is damaged (%s); it is set aside in %s, falling back to the one before", step,
                       str(error).splitlines()[0][:200] if error else "another process could not read it", target)
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            (self.directory / str(step)).rename(target)
        _anywhere(False)
        self._manager.reload()

    def latest_step(self) -> int | None:
        """The newest step on disk."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether a process was told to end (several processes; needs `jax.distributed`)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder."""
        self._manager.close()


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """One uint32 an array: the sum of its bits, each word weighted by its place, modulo 2³².

    Integer sums do not depend on their order, so not on the sharding either.
    """
    return jnp.stack([_checksum(leaf) for leaf in leaves])


def _checksum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    weights = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        weights = weights * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * weights + 1), dtype=jnp.uint32)


def _with_loop_shardings(target: Tree, like: Tree) -> Tree:
    """Give the blocks of a scanned state, taken apart, the sharding that each slice has inside the stack."""
    def slice_sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        return jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec(*leaf.sharding.spec[1:]))

    by_name = dict(flatten_with_names(like)[0])
    def place(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if name in by_name:
            sharding = by_name[name].sharding
        else:
            parts = ["encoderblock" if part.startswith("encoderblock_") else part for part in name.split("/")]
            sharding = slice_sharding(by_name["/".join(parts)])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    leaves, treedef = flatten_with_names(target)
    return jax.tree.unflatten(treedef, [place(name, leaf) for name, leaf in leaves])


def _anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any process; a barrier for all of them."""
    return bool(flag) if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
