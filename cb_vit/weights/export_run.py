"""The folder of a run from parameters alone: to begin from and to evaluate, but without an optimiser to go on with."""
from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cb_vit import io
from cb_vit.checkpoint import Checkpointer
from cb_vit.config import ConfigError
from cb_vit.pp.normalisation import HALF
from cb_vit.registry import parse_calls
from cb_vit.train_state import TrainState
from cb_vit.weights.dialects.images import evaluation
from cb_vit.weights.loading import Weights
from cb_vit.workdir import run_notes, write_notes

RANGES = ("value_range", "vgg_value_range")  # ops of a preprocessing string that normalise


def image_size(weights: Weights) -> tuple[int, int]:
    """(height, width) in pixels of the images that the positions are for.

    Raises:
        ConfigError: the positions are for images of any size.
    """
    if weights.grid is None:
        raise ConfigError("model", f"{weights} has no positions of its own, and DST must say for how many patches it "
                                   "is; give rows and columns: grid=14,14")
    return tuple(count * side for count, side in zip(weights.grid, weights.model.config.patch_size, strict=True))


def write_run(dst: str, weights: Weights, params: Any, overwrite: bool) -> list[str]:
    """Write `run.json` and one checkpoint.

    Args:
        dst: folder of the run.
        weights: the model.
        params: parameters of the model, on the host.
        overwrite: whether a folder that is there is replaced.

    Raises:
        ConfigError: it is not known how pixels were normalised, or for what size of images the model is; or the folder
            cannot be written.
    """
    if weights.normalisation is None:
        raise ConfigError("mean", f"{weights} does not say how its pixels were normalised, which a run must; give "
                                  "mean and std")
    shape = *image_size(weights), weights.channels
    step, pp, model = weights.step or 0, _preprocessing(weights), weights.model
    notes = run_notes(
        "vit", model.config, model.num_classes, weights.class_names, shape, pp, pp_evals={"exported": pp},
        total_steps=step, model_init={"path": weights.path, "step": weights.step, "report": list(weights.notes)})
    state = TrainState(jnp.int32(step), jax.tree.map(jnp.asarray, params), (), jnp.bool_(True))
    with _replacing_folder(dst, overwrite) as folder:
        with contextlib.closing(Checkpointer(folder / "checkpoints")) as checkpointer:
            checkpointer.save(state, {})
        write_notes(folder, None, notes)  # last: without it a folder is no run
    return []


def _preprocessing(weights: Weights) -> str:
    """Preprocessing for evaluation, with the normalisation that the weights have now."""
    normalisation = weights.normalisation
    known = weights.pp or evaluation({}, normalisation, weights.grid, weights.model.config.patch_size)[0]
    before = [call.text for call in parse_calls(known, "pp") if call.name not in RANGES]
    return "|".join([*before, "value_range(-1, 1)" if normalisation.same(HALF) else normalisation.op])


@contextlib.contextmanager
def _replacing_folder(dst: str, overwrite: bool) -> Iterator[Any]:
    """A folder to fill that takes the place of `dst` at the end; however it ends before, `dst` stays as it was.

    A link is replaced itself, and what it leads to stays. In a bucket, where nothing can be renamed, the folder is
    `dst` itself.
    """
    target = io.as_path(dst)
    if not io.is_local(dst):
        if overwrite and target.exists():
            target.rmtree()
        yield target
        return
    staged, replaced = (target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.{end}" for end in ("tmp", "old"))
    try:
        staged.mkdir(parents=True)
        yield staged
        there = overwrite and os.path.lexists(target)
        if there:
            target.rename(replaced)  # deleted once the new one stands in its place
        try:
            staged.rename(target)
        except OSError:
            if there:
                replaced.rename(target)
            raise
        if os.path.islink(replaced):
            replaced.unlink()
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ConfigError("DST", f"{dst} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
