"""Classes that are rare: how many examples each has, and how much more those then count in the loss."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cb_vit.config import ConfigError, suggest
from cb_vit.datasets.contents import DataError, class_name, contents_of

logger = logging.getLogger(__name__)
THREADS = 16
POWERS = {"balanced": 1.0, "sqrt": 0.5}


def labels_of(source: Any, skip_errors: bool = False) -> np.ndarray:
    """The label of every example, int64 [n]; -1: it has none. Read from the examples where they are not at hand.

    Args:
        source: the source of the examples.
        skip_errors: whether an example that cannot be read counts as one without a label.

    Raises:
        DataError: an example cannot be read.
    """
    def label(index: int) -> int:
        try:
            return source[index]["label"]
        except (DataError, OSError, ValueError) as error:
            if skip_errors:
                return -1
            raise error if isinstance(error, DataError) else DataError(f"example {index}: {error}") from None

    if hasattr(source, "all_labels"):
        return source.all_labels(skip_errors)
    logger.info("reading the labels of %s examples", f"{len(source):,}")
    with ThreadPoolExecutor(THREADS) as pool:
        return np.fromiter(pool.map(label, range(len(source))), np.int64, len(source))


def class_weights(how: str | Mapping[str, float], source: Any, skip_errors: bool, field: str) -> np.ndarray:
    """How much each class counts in the loss, float32 [c].

    "balanced" is scikit-learn's, w_c = n / (C n_c): all classes count alike, however many examples they have; "sqrt" is
    half of the way there, w_c ∝ 1 / √n_c. Both have a mean of 1 over the examples with a label, so that a learning rate
    means what it did. A mapping holds the weights themselves, and 1 for the classes that it leaves out.

    Args:
        how: "balanced", "sqrt", or weights by the names of classes.
        source: the training data, with the labels of the head.
        skip_errors: whether examples that cannot be read are left out.
        field: the setting, for errors.

    Raises:
        ConfigError: at `field`: a name is of no class, or no example has a label.
        DataError: an example cannot be read.
    """
    if isinstance(how, Mapping):
        return _given(how, [class_name(source.class_names, i) for i in range(source.num_classes)], field)
    counts = contents_of(source).counts
    if counts is None:
        counts = np.bincount(labelled(labels_of(source, skip_errors), field), minlength=source.num_classes)
    weights = np.where(counts > 0, np.maximum(counts, 1) ** -POWERS[how], 0.0)
    return np.float32(weights * counts.sum() / (weights @ counts))


def labelled(labels: np.ndarray, field: str) -> np.ndarray:
    """The labels that are not -1.

    Raises:
        ConfigError: at `field`: there are none.
    """
    if not np.any(labels >= 0):
        raise ConfigError(field, "goes by labels, and not one example has one")
    return labels[labels >= 0]


def _given(weights: Mapping[str, float], names: list[str], field: str) -> np.ndarray:
    for name, weight in weights.items():
        if name not in names:
            near = suggest(name, names).removesuffix(";")
            raise ConfigError(f"{field}.{name}", f"no class of the {len(names)} is called so{near}")
        if not 0 <= weight < np.inf:
            raise ConfigError(f"{field}.{name}", f"a weight is a number of 0 or more, got {weight}")
    return np.float32([weights.get(name, 1.0) for name in names])
