"""Error under common corruptions, made on the fly of any data: ImageNet-C's, and for small images CIFAR-10-C's.

The corruptions and their strengths are those of Hendrycks & Dietterich (arXiv 1903.12261), see `pp/corruptions.py`. The
published data sets are files: JPEG of quality 85 in the case of ImageNet-C, made once. Here the images are corrupted
after resize and crop, are not stored as JPEG once more, and the draws are others: errors are near those of the
published benchmark, but not the same.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cb_vit import dist
from cb_vit.config import ConfigError
from cb_vit.datasets.chosen import some
from cb_vit.datasets.labels import assumes_imagenet
from cb_vit.evaluators.classification import batch_sums
from cb_vit.evaluators.common import EvaluatorConfig, PredictFn, check_folder, over_batches
from cb_vit.evaluators.mistakes import table
from cb_vit.evaluators.passes import PASS, in_passes
from cb_vit.input_pipeline import Pipeline
from cb_vit.monitor.corruptions import draw_errors
from cb_vit.monitor.progress import counted
from cb_vit.pp.corruptions import BUILT_IN, CORRUPTIONS, SEVERITIES, SMALL, check_corruption
from cb_vit.train_state import TrainState

ALL, CLEAN = "all", ("clean", 0)
# Top-1 error of AlexNet, mean over the severities of each corruption: `ALEXNET_ERR` of AugMix's code
# (https://github.com/google-research/augmix, imagenet.py), which has it from the authors' repository.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500}
ALEXNET_CLEAN = 0.43478  # torchvision's AlexNet, 56.522 % right; the paper's table says 43.5 %
IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvaluatorConfig):
    """Settings of an evaluator of corruptions.

    Attributes:
        corruptions: names of the corruptions; "all": the 15; None: all but frost, which needs pictures that
            `pip install 'cb_vit[corruptions]'` brings.
        severities: strengths of each, from 1 to 5.
        examples: number of examples, drawn by lot; None, or more than there are: all.
        seed: seed of the lots and of the corruptions.
    """

    corruptions: tuple[str, ...] | Literal["all"] | None = None
    severities: tuple[int, ...] = SEVERITIES
    examples: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_folder(self)
        for name in self.names:
            self.check_name(name)
        for field, values in (("corruptions", self.names), ("severities", self.severities)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(field, f"must be different, and at least one; got {values}")
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise ConfigError("severities", f"go from 1 to 5, got {severity}")
        if self.examples is not None and self.examples < 1:
            raise ConfigError("examples", f"must be at least 1, got {self.examples}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be in [0, 2³²), got {self.seed}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the corruptions that are measured."""
        if self.corruptions is None:
            return BUILT_IN
        return tuple(CORRUPTIONS) if self.corruptions in (ALL, (ALL,)) else self.corruptions

    def check_name(self, name: str) -> None:
        """Refuse a corruption that cannot be had."""
        check_corruption(name, "corruptions")


class Evaluator:
    """Top-1 error under corruptions, over a data source; `files` shows that of the last run.

    Labels may be multi-hot, as in `classification`; an example without any label is left out.
    """

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding):
        self.config, self.source = config, pipeline.source
        shape, _ = pipeline.spec["image"]
        if shape[2] not in (1, 3):
            raise ConfigError("pp_fn", f"makes images of {shape[2]} channels, and corruptions take 1 or 3; decode "
                                       "makes it 3")
        clean, preprocess = self.some(pipeline), pipeline.preprocess
        passes = {CLEAN: clean} | {(name, severity): self.corrupted(clean, name, severity)
                                   for name in config.names for severity in config.severities}
        self._passes, self._pipeline = tuple(passes), in_passes(tuple(passes.values()))
        self._sharding, self._step = sharding, 0
        self._benchmark = min(shape[:2]) >= SMALL and is_imagenet(pipeline.source.class_names)
        self._found: dict[tuple[str, int], tuple[int, int]] = {}

        def sums(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            which, batch = batch[PASS], preprocess.device(batch)
            logits, _ = predict_fn(state, batch["image"])
            # Row by row, as the rows of a batch may be of several passes.
            rows = jax.vmap(lambda *row: batch_sums(*(part[None] for part in row), jnp.zeros(1)))(
                logits, batch["labels"], batch["_mask"])
            per_pass = {name: jax.ops.segment_sum(rows[name], which, len(self._passes)) for name in ("prec@1", "seen")}
            return {**per_pass, "masked": jnp.sum(~batch["_mask"], dtype=jnp.int32)}

        self._sums = jax.jit(sums, out_shardings=dist.replicated(sharding.mesh))

    def some(self, pipeline: Pipeline) -> Pipeline:
        """A pipeline of the examples that are measured."""
        return dataclasses.replace(pipeline, source=some(pipeline.source, self.config.examples, self.config.seed))

    def corrupted(self, clean: Pipeline, name: str, severity: int) -> Pipeline:
        """The pipeline of a corruption, from that of the images without one."""
        return dataclasses.replace(clean, preprocess=clean.preprocess.with_op(f"corrupt({name!r}, {severity})"))

    def run(self, train_state: TrainState) -> Iterator[tuple[str, float]]:
        """Yields `error`, the mean over corruptions and severities; `severity_1/error` … and `fog/error` …, the means
        over the others; `clean/error`; and of ImageNet at its full, `mce` and `relative_mce`.

        Raises:
            DataError: more examples cannot be read than `skip_errors` allows.
        """
        self._step, self._found = int(train_state.step), self._count(train_state)
        errors, clean = self._errors(), _share(*self._found[CLEAN])
        yield "error", float(np.mean(list(errors.values())))
        for number, severity in enumerate(self.config.severities):
            yield f"severity_{severity}/error", float(np.mean([values[number] for values in errors.values()]))
        for name, values in errors.items():
            yield f"{name}/error", float(np.mean(values))
        yield "clean/error", clean
        if self._benchmark and errors.keys() == ALEXNET.keys() and set(self.config.severities) == set(SEVERITIES):
            mce, relative = mean_corruption_error(errors, clean)
            yield "mce", mce
            yield "relative_mce", relative

    def files(self) -> Iterator[tuple[str, str | bytes]]:
        """A table and a picture of the last run, by the names of their files."""
        yield "corruptions.csv", table(("corruption", "severity", "error", "examples"), (
            (name, severity, f"{_share(right, seen):.6f}" if seen else "", seen)
            for (name, severity), (right, seen) in self._found.items()))
        right, seen = self._found[CLEAN]
        yield "corruptions.png", draw_errors(
            self._errors(), self.config.severities, _share(right, seen), f"step {self._step}: {seen:,} examples")

    def _count(self, train_state: TrainState) -> dict[tuple[str, int], tuple[int, int]]:
        """How many examples of each pass are right, and how many there are."""
        size, source = self.config.batch_size, self._pipeline.source
        total = np.zeros((2, len(self._passes)), np.int64)
        batches = over_batches(lambda batch: self._sums(train_state, batch), self._pipeline, self._sharding,
                               self.config.seed)
        with counted(-(-len(source) // size), sys.stderr if jax.process_index() == 0 else None) as tell:
            for number, sums in enumerate(batches):
                name, severity = self._passes[source.pass_of(number * size)]
                tell(f"{name} {severity or ''}".strip())
                total += np.stack([sums["prec@1"], sums["seen"]]).astype(np.int64)
        return dict(zip(self._passes, map(tuple, total.T.tolist()), strict=True))

    def _errors(self) -> dict[str, list[float]]:
        """The errors of each corruption, in the order of the severities."""
        return {name: [_share(*self._found[name, severity]) for severity in self.config.severities]
                for name in self.config.names}


def mean_corruption_error(errors: Mapping[str, Sequence[float]], clean: float) -> tuple[float, float]:
    """The mean corruption error (mCE) of ImageNet-C and the relative one, 1 where a model is as good as AlexNet.

    The mean over corruptions of a model's error, divided by AlexNet's; of both, the relative one takes off the error
    on clean images first (arXiv 1903.12261, section 4). The paper writes them times 100.

    Args:
        errors: top-1 errors of each of the 15 corruptions at its five severities.
        clean: top-1 error without a corruption.

    Raises:
        ValueError: a corruption or a severity is missing.
    """
    wrong = [name for name in ALEXNET.keys() | errors.keys()
             if name not in ALEXNET or len(errors.get(name, ())) != len(SEVERITIES)]
    if wrong:
        raise ValueError(f"mCE needs the 15 corruptions at five severities each; not so {', '.join(sorted(wrong))}")
    means = {name: np.mean(errors[name]) for name in ALEXNET}
    mce = np.mean([means[name] / ALEXNET[name] for name in ALEXNET])
    relative = np.mean([(means[name] - clean) / (ALEXNET[name] - ALEXNET_CLEAN) for name in ALEXNET])
    return float(mce), float(relative)


def is_imagenet(names: Sequence[str] | None) -> bool:
    """Whether these are the names of ImageNet's 1 000 classes."""
    return len(names or ()) == IMAGENET_CLASSES and assumes_imagenet(names, None, IMAGENET_CLASSES)


def _share(right: int, seen: int) -> float:
    return 1 - right / seen if seen else float("nan")
