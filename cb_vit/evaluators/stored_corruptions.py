"""Error under the corruptions of ImageNet-C as it is published: files, of each corruption at five severities.

The folders are `ROOT/<corruption>/<severity>/<class>/*.JPEG`, as the archives of https://zenodo.org/records/2235448
hold them; the images have 224×224 pixels, resized and cropped before they were corrupted. So they are seen as they are,
by models of other sizes resized, where `data`, the images without a corruption, goes through all of `pp_fn`.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import NamedSharding

from cb_vit.config import ConfigError, suggest
from cb_vit.datasets.core import SourceConfig
from cb_vit.datasets.folder import FolderConfig
from cb_vit.evaluators import corruptions
from cb_vit.evaluators.common import PredictFn
from cb_vit.input_pipeline import Pipeline
from cb_vit.pp import builder
from cb_vit.pp.builder import Preprocess
from cb_vit.registry import parse_calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(corruptions.Config):
    """Settings of an evaluator of stored corruptions; `corruptions` None: the 15.

    Attributes:
        root: folder that holds those of the corruptions; local or mounted.
    """

    root: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the corruptions that are measured."""
        every = self.corruptions in (None, corruptions.ALL, (corruptions.ALL,))
        return tuple(corruptions.ALEXNET) if every else self.corruptions

    def check_name(self, name: str) -> None:
        """Refuse what is no folder of ImageNet-C."""
        if name not in corruptions.ALEXNET:
            raise ConfigError("corruptions", f"ImageNet-C has no {name!r}{suggest(name, corruptions.ALEXNET)} Choices: "
                                             f"{', '.join(corruptions.ALEXNET)}")

    @property
    def further(self) -> dict[str, SourceConfig]:
        """The images of each corruption and severity."""
        return {_field(name, severity): FolderConfig(
            name="folder", root=f"{self.root}/{name}/{severity}", split="all", whole=True)
            for name in self.names for severity in self.severities}


class Evaluator(corruptions.Evaluator):
    """Top-1 error on stored corruptions; the metrics, `mce` among them, are those of `corruptions`."""

    def __init__(self, predict_fn: PredictFn, *, config: Config, pipeline: Pipeline, sharding: NamedSharding,
                 **stored: Pipeline):
        vars(self).update(stored)
        super().__init__(predict_fn, config=config, pipeline=pipeline, sharding=sharding)
        # The benchmark itself, whatever the size of the model's images.
        self._benchmark = corruptions.is_imagenet(pipeline.source.class_names)

    def corrupted(self, clean: Pipeline, name: str, severity: int) -> Pipeline:
        """The pipeline of the images of a corruption."""
        stored: Any = self.some(getattr(self, _field(name, severity)))
        return dataclasses.replace(stored, preprocess=_as_stored(stored.preprocess, clean.spec["image"][0]))


def _field(name: str, severity: int) -> str:
    return f"{name}/{severity}"


def _as_stored(preprocess: Preprocess, shape: tuple[int, ...]) -> Preprocess:
    """The preprocessing of images [y x c] that are cropped already."""
    calls = [call.text for call in parse_calls(preprocess.text, preprocess.path)]
    device = calls[len(calls) - len(preprocess.device_ops):]
    decode = calls[0] if calls[0].startswith("decode") else "decode"
    return builder.build("|".join([decode, f"resize({shape[:2]})", *device]), preprocess.path)
