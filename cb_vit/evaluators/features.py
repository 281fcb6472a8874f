"""What a model makes of an image before its head: the features that probes are about."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cb_vit.config import ConfigError, suggest
from cb_vit.datasets import DataError
from cb_vit.evaluators.common import PredictFn
from cb_vit.input_pipeline import Pipeline
from cb_vit.train_state import TrainState
from cb_vit.tree import flatten_with_names


def check_layer(out: Mapping[str, Any], layer: str) -> None:
    """Refuse a layer that is not one vector an example.

    Args:
        out: shapes of the model's intermediates, of a batch.
        layer: name of one, such as "pre_logits"; deeper ones as "encoder/block03/sa".

    Raises:
        ConfigError: at "representation_layer".
    """
    shapes = {name: leaf.shape for name, leaf in flatten_with_names(dict(out))[0]}
    vectors = [name for name, shape in shapes.items() if len(shape) == 2]
    if layer not in shapes:
        raise ConfigError("representation_layer", f"the model has no {layer!r}{suggest(layer, shapes)} one vector an "
                                                  f"example has {', '.join(vectors) or 'none of its layers'}")
    if layer not in vectors:
        raise ConfigError("representation_layer", f"{layer!r} is {list(shapes[layer][1:])} an example, and one vector "
                                                  f"is wanted: {', '.join(vectors) or 'the model has none'}")


def labelled_features(
    predict_fn: PredictFn, layer: str, pipeline: Pipeline, state: TrainState, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Features and labels of a batch.

    Args:
        predict_fn: the model.
        layer: name of the layer, one that `check_layer` lets pass.
        pipeline: loader of the batch.
        state: the train state.
        batch: the batch as loaded.

    Returns:
        "features" float32 [b d]; "labels" bool [b c], whether a class is right; "counted" bool [b], whether the row is
        an example with a label; "masked" int32 [], the number of rows without an example.
    """
    batch = pipeline.preprocess.device(batch)
    _, out = predict_fn(state, batch["image"])
    labels = batch["labels"] > 0
    return {"features": dict(flatten_with_names(dict(out))[0])[layer].astype(jnp.float32), "labels": labels,
            "counted": batch["_mask"] & jnp.any(labels, axis=1),
            "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}


def check_single(labels: int, examples: int, field: str) -> None:
    """Refuse examples to learn from that have several labels.

    Args:
        labels: number of labels of some examples.
        examples: number of those that have any.
        field: name of the block of the data.

    Raises:
        DataError: there are more labels than examples.
    """
    if labels > examples:
        raise DataError(f"{field}: examples have several labels, and are to be learnt from as of one class; give data "
                        "with one label each")
