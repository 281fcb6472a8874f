"""DeiT's distillation (arXiv 2012.12877, section 3): a frozen teacher, and its share of the loss.

The student has a distillation token with a head of its own, which learns from the teacher while the class token's
head learns from the labels; at inference the two heads are averaged. With L the loss on labels, Z the logits,

    hard   (1 - α) L(Z_cls) + α CE(Z_dist, argmax Z_teacher)
    soft   (1 - α) L(Z_cls) + α τ² KL(softmax(Z_teacher / τ) ‖ softmax(Z_dist / τ)) / C

The teacher sees the student's images, mixed and erased as they are. The soft loss is divided by the number C of
classes as in DeiT's code, which averages over all elements.
"""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cb_vit.config import ConfigError, under
from cb_vit.datasets import labels
from cb_vit.losses import distill_hard, distill_soft
from cb_vit.pp.builder import Preprocess
from cb_vit.weights import Weights

Tree = Any
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The block `config.distillation`; the defaults are DeiT's.

    Attributes:
        teacher: path of the model that teaches: a run's workdir, or a file of weights, as `cb_vit.load` takes them.
        type: what is learnt: the teacher's decisions ("hard") or its probabilities ("soft").
        alpha: the teacher's share of the loss, in (0, 1].
        tau: temperature of the probabilities of "soft"; above 0.
    """

    teacher: str
    type: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    tau: float = 1.0

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise ConfigError("alpha", f"is the teacher's share of the loss, in (0, 1], got {self.alpha}")
        if not self.tau > 0:
            raise ConfigError("tau", f"is a temperature above 0, got {self.tau}")
        if self.type == "hard" and self.tau != 1:
            raise ConfigError("tau", "has no effect with type='hard'; it needs 'soft'")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model that is shown the student's images.

    Attributes:
        config: settings of what is learnt from it.
        weights: the teacher's model, and its parameters on disk.
        adapt: function from the student's normalised images to the teacher's.
        classes: number of each of the student's classes among the teacher's.
    """

    config: DistillationConfig
    weights: Weights
    adapt: Callable[[Array], Array]
    classes: tuple[int, ...]

    def logits(self, params: Tree, image: Float[Array, "b y x c"]) -> Float[Array, "b classes"]:
        """Logits of the student's classes, of images as the student sees them."""
        logits, _ = self.weights.model.apply({"params": params}, self.adapt(image), train=False)
        if self.classes != tuple(range(logits.shape[-1])):
            logits = logits[:, np.asarray(self.classes)]
        return jax.lax.stop_gradient(logits)

    def loss(
        self, params: Tree, image: Float[Array, "b y x c"], out: dict[str, Array], label_loss: Float[Array, " b"],
    ) -> Float[Array, " b"]:
        """The student's loss.

        Args:
            params: the teacher's parameters.
            image: images as the student saw them.
            out: named intermediates of the student, "logits_dist" among them.
            label_loss: loss of the class token's head against the labels.
        """
        logits = self.logits(params, image)
        share = distill_hard(out["logits_dist"], logits) if self.config.type == "hard" else \
            distill_soft(out["logits_dist"], logits, self.config.tau)
        return (1 - self.config.alpha) * label_loss + self.config.alpha * share


def make_teacher(
    config: DistillationConfig, weights: Weights, preprocess: Preprocess, image_shape: tuple[int, int, int],
    num_classes: int, class_names: Sequence[str] | None = None, path: str = "config.distillation",
) -> Teacher:
    """Fit a teacher to its student.

    Args:
        config: the block `config.distillation`.
        weights: the teacher's model, its parameters not read yet.
        preprocess: the student's preprocessing, whose normalisation is converted to the teacher's.
        image_shape: shape of the student's images, [y x c].
        num_classes: width of the student's head.
        class_names: names of the student's classes; None: not known.
        path: name of the block, for errors.

    Raises:
        ConfigError: the teacher has other classes, or cannot take the student's images.
    """
    with under(path):
        adapt = weights.adapter(preprocess)
    teacher = Teacher(config, weights, adapt, _classes(weights, num_classes, class_names, f"{path}.teacher"))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(teacher.logits, weights.shapes, image)
    except Exception as error:  # whatever the model says to images it was not made for
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(f"{path}.teacher", f"{config.teacher} has positions for {weights.grid} patches and cannot "
                                             f"take images {image_shape} ({reason})") from None
    return teacher


def _classes(weights: Weights, num_classes: int, names: Sequence[str] | None, path: str) -> tuple[int, ...]:
    """The number of each of the student's classes among the teacher's."""
    theirs = weights.model.num_classes
    if not theirs:
        raise ConfigError(path, f"{weights} has no head, and so nothing to teach")
    try:
        places = labels.match(names, weights.class_names, theirs)
    except labels.Unmatched as error:
        raise ConfigError(path, f"{error}, the classes of {weights}. A teacher must know all of the student's "
                                "classes, those without data too; "
                                "config.input.data.labels='index' goes by their numbers") from None
    if places is not None:
        return places
    if theirs != num_classes:
        raise ConfigError(path, f"{weights} has {theirs} classes, the student has {num_classes}")
    logger.info("teacher %s: classes are taken by their numbers", weights)
    return tuple(range(theirs))
