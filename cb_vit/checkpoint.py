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
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from cb_vit import io
from cb_vit.config import ConfigError
from cb_vit.models.common import to_loop, to_scan
from cb_vit.train_state import TrainState
from cb_vit.tree import flatten_with_names, names, unflatten_names

logger = logging.getLogger(__name__)
Tree = Any
Item = Literal["params", "ema"]
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """The block `config.keep_best`: keep the checkpoints with the best value of a metric.

    Attributes:
        metric: e.g. "val/prec@1"; a checkpoint is saved whenever its evaluator has run.
        n: how many.
        mode: whether the largest or the smallest is best.
    """

    metric: str = "val/prec@1"
    n: int = 1
    mode: Literal["max", "min"] = "max"

    def __post_init__(self):
        if self.n < 1:
            raise ConfigError("n", f"must be at least 1, got {self.n}")


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
        self._best = _Best(keep_best) if keep_best else None
        policies: list[Any] = [preserve.LatestN(keep_last)]
        if keep_every:
            policies.append(preserve.EveryNSteps(keep_every))
        if self._best:
            policies.append(self._best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies), create=not read_only,
            cleanup_tmp_directories=not read_only, read_only=read_only)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=_handlers())
        if self._best:
            for step in self._manager.all_steps():
                with contextlib.suppress(Exception):  # a damaged one is not among the best
                    self._best.judge(step, self._read_meta(step)["metrics"])

    def save(self, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
        """Begin to save `state` under its step; returns once the devices may go on.

        Args:
            state: must be finite; the caller has checked.
            meta: JSON values to store beside it.
            metrics: of this step; stored too, and what `keep_best` goes by.

        Returns:
            Whether there was something to save: a step that is there already is not saved again.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self._check_folder()
        arrays = _to_loop(state.arrays)
        described = zip(_describe(arrays).items(), _checksums(arrays), strict=True)
        listed = {name: [*what, value] for (name, what), value in described}
        meta = json.loads(json.dumps(
            {**meta, "format": FORMAT, "step": step, "metrics": dict(metrics or {}), "arrays": listed}))
        if self._best and metrics:
            self._best.judge(step, metrics)
        with self._saving():
            self._manager.save(step, force=True, args=ocp.args.Composite(
                **{item: ocp.args.PyTreeSave(tree) for item, tree in arrays.items()},
                meta=ocp.args.JsonSave({**meta, "digest": _digest(meta)})))
        return True

    def check(self) -> None:
        """Raise what has gone wrong in the background so far; waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def _check_folder(self) -> None:
        """Refuse to save where the run's folder was: Orbax would make it anew, and nobody would look there."""
        if io.is_local(self.directory) and not self.directory.exists():
            raise io.cannot_write(self.directory, FileNotFoundError(errno.ENOENT, ""))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Whatever Orbax and TensorStore make of storage that fails, as an `io.CannotWrite`."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise io.cannot_write(self.directory, error) from None

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
            except (Mismatch, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise  # no fault of the checkpoint
            except Exception as reason:  # whatever a broken file makes the readers raise
                error = reason
            if not _anywhere(error is not None):
                return result
            if self._read_only:
                raise ConfigError("checkpoint", f"step {step} in {self.directory} cannot be read: {error}")
            self._set_aside(step, error)
        return None

    def _restore(self, step: int, like: TrainState, scan: bool) -> tuple[TrainState, dict[str, Any]]:
        wanted = like.arrays
        target = in_loop_layout(wanted)
        meta = self._read_meta(step)
        self._check_fit(step, meta, target)
        arrays = self._read_arrays(step, meta, target)
        if scan:
            arrays = jax.jit(to_scan, out_shardings=_shardings(wanted))(arrays)
        scalar = lambda value, leaf: jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)  # noqa: E731
        return TrainState(scalar(step, like.step), arrays["params"], arrays.get("opt", like.opt),
                          scalar(True, like.finite), arrays.get("ema")), meta

    def params_shapes(self, step: int | None = None, item: Item = "params") -> tuple[int, Tree]:
        """What parameters a checkpoint holds, whatever their model; reads no arrays.

        Args:
            step: default the newest.
            item: the parameters, or their moving average.

        Returns:
            The step, and shapes and dtypes of its parameters in loop layout.

        Raises:
            ConfigError: there is no such checkpoint, or it has no such item, or it cannot be read.
        """
        steps = sorted(self._manager.all_steps())
        if not steps or step not in (None, *steps):
            held = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
            raise ConfigError("checkpoint", f"{self.directory} holds {held}" + f", none of step {step}" * bool(steps))
        step = steps[-1] if step is None else step
        with self._named_errors(step):
            arrays = self._read_meta(step)["arrays"]
        named = {name.removeprefix(f"{item}/"): jax.ShapeDtypeStruct(shape, dtype)
                 for name, (shape, dtype, _) in arrays.items() if name.startswith(f"{item}/")}
        if not named:
            raise ConfigError("checkpoint", f"step {step} in {self.directory} has no {item!r}; its run kept no average")
        return step, unflatten_names(named)

    def restore_params(self, step: int, like: Tree, item: Item = "params") -> Tree:
        """The parameters of a checkpoint, each leaf straight onto its devices, checksums verified.

        Args:
            step: which.
            like: as `params_shapes` gives them, with shardings.
            item: as there.

        Raises:
            ConfigError: it cannot be read.
        """
        with self._named_errors(step):
            return self._read_arrays(step, self._read_meta(step), {item: like})[item]

    @contextlib.contextmanager
    def _named_errors(self, step: int) -> Iterator[None]:
        """Whatever a broken file makes the readers raise, as a `ConfigError` that names the checkpoint."""
        try:
            yield
        except (ConfigError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0][:200]
            raise ConfigError("checkpoint", f"step {step} in {self.directory} cannot be read: {reason}") from None

    def _read_meta(self, step: int) -> dict[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta.pop("digest", None) != _digest(meta):
            raise ValueError("its notes have changed")
        if meta["format"] != FORMAT:
            raise Mismatch("workdir", f"checkpoint {step} in {self.directory} has format {meta['format']}, this "
                                      f"version reads {FORMAT}; read it with the version that wrote it")
        return meta

    def _read_arrays(self, step: int, meta: Mapping[str, Any], target: Tree) -> dict[str, Tree]:
        """Items of a checkpoint as `target` has them, their checksums verified."""
        arrays = dict(self._manager.restore(step, args=ocp.args.Composite(**{
            item: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for item, tree in target.items()})))
        for name, value in zip(names(arrays), _checksums(arrays), strict=True):
            if meta["arrays"][name][-1] != value:
                raise ValueError(f"checksum of {name} does not match")
        return arrays

    def _check_fit(self, step: int, meta: Mapping[str, Any], target: Tree) -> None:
        where = f"checkpoint {step} in {self.directory}"
        another = "it is of another model or optimiser; use another workdir, or the config it was made with"
        saved, here = {name: what[:-1] for name, what in meta["arrays"].items()}, _describe(target)
        for title, some in (("lacks", here.keys() - saved.keys()), ("has besides", saved.keys() - here.keys())):
            if some:
                shown = ", ".join(sorted(some)[:3]) + (" …" if len(some) > 3 else "")
                raise Mismatch("workdir", f"{where} {title} {shown}: {another}")
        for name, (shape, dtype) in here.items():
            if saved[name] != [shape, dtype]:
                was = f"{saved[name][1]} {saved[name][0]}"
                raise Mismatch("workdir", f"{name} is {was} in {where} and {dtype} {shape} in this config: {another}")

    def _set_aside(self, step: int, error: Exception | None) -> None:
        aside = self.directory.parent / "damaged_checkpoints"
        reason = "another process could not read it" if error is None else (str(error) or repr(error)).splitlines()[0]
        logger.warning("checkpoint %d is damaged (%s); it is set aside in %s, falling back to the one before", step,
                       reason[:200], aside)
        if jax.process_index() == 0:
            aside.mkdir(parents=True, exist_ok=True)
            folders = itertools.chain([f"{step}"], (f"{step}-{i}" for i in itertools.count(2)))
            (self.directory / str(step)).rename(next(aside / name for name in folders if not (aside / name).exists()))
        _anywhere(False)
        self._manager.reload()

    def latest_step(self) -> int | None:
        """The newest step on disk."""
        return self._manager.latest_step()

    def last_good(self) -> str:
        """The newest complete checkpoint, in words for an error; of a folder that has gone, the newest it had."""
        steps = saved_steps(self.directory) or self._manager.all_steps()
        return f"the last good checkpoint is step {max(steps)} in {self.directory}" if steps else \
            "there is no checkpoint yet"

    def reached_preemption(self, step: int) -> bool:
        """Whether a process was told to end (several processes; needs `jax.distributed`)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until everything is on disk; raises what went wrong in the background."""
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


def _handlers() -> dict[str, Any]:
    """Readers and writers of the items.

    The first replica of an array writes it. Orbax's default, a slice of it from each replica, compiles a
    program for every shape on every device before the first save.
    """
    arrays = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)))
    return {"meta": ocp.JsonCheckpointHandler(), **{
        item: ocp.PyTreeCheckpointHandler(type_handler_registry=arrays) for item in ("params", "opt", "ema")}}


class _Best(preserve.PreservationPolicy):
    """Keeps the best checkpoints; unlike Orbax's own `BestN` it knows those of earlier processes."""

    def __init__(self, keep: KeepBest):
        self._keep, self._scores = keep, {}

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the score of a checkpoint, if it has one."""
        score = metrics.get(self._keep.metric)
        if score is None and metrics:
            logger.warning("keep_best cannot judge checkpoint %d: %s is not among its metrics, %s", step,
                           self._keep.metric, ", ".join(metrics))
        if score is not None and not math.isnan(score):
            self._scores[step] = score

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For each checkpoint, whether it is among the best."""
        del context
        judged = [info.step for info in checkpoints if info.step in self._scores]
        best = sorted(judged, key=self._scores.__getitem__, reverse=self._keep.mode == "max")[:self._keep.n]
        return [info.step in best for info in checkpoints]


def _describe(tree: Tree) -> dict[str, list[Any]]:
    """Name -> [shape, dtype] of every leaf, in JAX's leaf order, as JSON has them."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flatten_with_names(tree)[0]}


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _checksums(tree: Tree) -> list[int]:
    """One 32-bit number a leaf, in JAX's leaf order."""
    # A program a shape compiles five times faster than one for the tree; each is waited for, since many small
    # collectives under way at once can lock up simulated CPU devices.
    return [int(_checksum(leaf)) for leaf in jax.tree.leaves(tree)]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Σ hash(word ⊕ hash(place)) modulo 2³², over the words of an array.

    A sum of integers does not depend on its order, so not on the sharding either. The hash is a
    permutation: a changed word is always seen, words that changed places but for one time in 2³².
    """
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(_hash(bits.astype(jnp.uint32) ^ _hash(place)), dtype=jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, a permutation of 32-bit words."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _to_loop(tree: Tree) -> Tree:
    """`to_loop` on the devices; each block keeps the sharding that it has in the stack."""
    target = in_loop_layout(tree)
    if jax.tree.structure(target) == jax.tree.structure(tree):
        return tree
    return jax.jit(to_loop, out_shardings=_shardings(target))(tree)


def in_loop_layout(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of `to_loop(tree)`."""
    return jax.tree.map(lambda leaf: leaf.struct, to_loop(jax.tree.map(_Abstract, tree)))


def _shardings(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


class _Abstract:
    """An array without values, that `to_loop` can take apart along its first axis."""

    def __init__(self, leaf: jax.Array | jax.ShapeDtypeStruct):
        self.struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    def __len__(self) -> int:
        return self.struct.shape[0]

    def __getitem__(self, index: int) -> _Abstract:
        shape, where = self.struct.shape[1:], self.struct.sharding
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
        return _Abstract(jax.ShapeDtypeStruct(shape, self.struct.dtype, sharding=where))


def _anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any process; a barrier for all of them."""
    return bool(flag) if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
