"""From a data source to global batches on the devices.

The order of examples, and every random draw made for one, is a pure function of (seed, position in the
global order): position p of step s is s·batch_size + p, and shuffling, repeating and augmenting are
Grain `MapDataset` transformations addressed by it. A process then loads just the rows that its devices
hold. So the batches are the same for any number of processes, workers or devices, the data position of a
run *is* its step, and no iterator state is ever stored.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
from collections.abc import Generator
from typing import Annotated, Any, ClassVar

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from cb_vit import dist
from cb_vit.config import ConfigError, Read
from cb_vit.datasets import DataError, Source, check_source
from cb_vit.datasets.core import SourceConfig
from cb_vit.datasets.rare_classes import labels_of
from cb_vit.order import BalancedOrder, Reordered, RepeatedOrder, Rows
from cb_vit.pp.builder import Preprocess, build
from cb_vit.texts import printable
from cb_vit.workers import LiveWithParent, allow_unparsed_flags, why_ended

logger = logging.getLogger(__name__)
Example = dict[str, np.ndarray]
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and dtype of each array of an example
Batches = Generator[Example, None, None]  # closing one ends the threads and processes that work for it
PADDING = -1  # position in the source of a row that only fills up a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What `config.input` and every block of `config.evals` say of how examples are loaded.

    Attributes:
        data: settings of the source; `name` picks it, the other keys are the source's own (`docs/data.md`).
        batch_size: number of examples in a global batch.
        num_workers: number of processes that load and augment, on each host; 0: threads of the main process do.
        num_threads: number of threads that load and augment, in each of these processes.
        prefetch: number of batches made ahead.
        skip_errors: share of the examples read in an epoch, on all hosts, that may be unreadable: their rows are
            masked out of loss and metrics. True: 1 %; False: none, the first one ends the run. More than that, judged
            from 1 000 examples on and at the epoch's end, or a batch without a readable example, ends it too.
    """

    data: Annotated[SourceConfig, Read(Any, check_source)]
    batch_size: int
    num_workers: int = 0
    num_threads: int = min(16, os.cpu_count() or 1)
    prefetch: int = 2
    skip_errors: bool | float = False
    repeats: ClassVar[int] = 1  # only training repeats images, and cuts a batch into ranks
    virtual_ranks: ClassVar[int] = 1

    def __post_init__(self):
        error_share(self.skip_errors)
        for name in ("batch_size", "num_workers", "num_threads", "prefetch", "repeats", "virtual_ranks"):
            value, least = getattr(self, name), 0 if name == "num_workers" else 1
            if value is not None and value < least:
                raise ConfigError(name, f"must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig(LoaderConfig):
    """The block `config.input`.

    Attributes:
        pp: preprocessing of an example, e.g. "decode|inception_crop(224)|flip_lr|value_range(-1,1)|onehot(1000)".
        repeats: number of differently augmented copies of an image in a batch (repeated augmentation, arXiv 1901.09335;
            DeiT has 3); an epoch, of as many steps as ever, sees 1/repeats of the images.
        balance: how far the classes are evened out in an epoch, from 0, as they are, to 1, all alike: a class of n
            examples has a share that grows with n^(1 - balance), so that images of rare ones come more often. Then
            examples without a label do not come.
        virtual_ranks: number of parts of a batch that count as the ranks of DeiT's distributed training: copies of an
            image go to different ranks, and mixup's groups are their rows. DeiT has 4 in a batch of 1024.
    """

    pp: Annotated[Preprocess, Read(str, build)]
    repeats: int = 1
    balance: float = 0.0
    virtual_ranks: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise ConfigError("balance", f"goes from 0, as the classes are, to 1, all alike; got {self.balance}")
        if self.repeats > 1 and self.batch_size % self.virtual_ranks:
            raise ConfigError("virtual_ranks", f"{self.virtual_ranks} does not divide batch_size {self.batch_size}, "
                                               "which repeats needs")


@dataclasses.dataclass(frozen=True)
class Loader:
    """How one example is loaded; called by Grain in threads and worker processes.

    Attributes:
        source: source of the raw examples.
        preprocess: preprocessing, of which the host part is run.
        spec: shape and dtype of each array of an example, for rows that hold none.
        skip_errors: whether a broken example is masked instead of ending the run.
    """

    source: Source
    preprocess: Preprocess
    spec: Spec
    skip_errors: bool | float

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The example at `index` of the source, and "_mask": whether it is one."""
        if index == PADDING:
            return self._blank()
        try:
            return load_example(self.source, self.preprocess, index, rng) | {"_mask": np.True_}
        except DataError as error:
            if not self.skip_errors:
                raise
            logger.warning("skipped: %s", printable(error))  # a worker has a log of its own
            return self._blank()

    def _blank(self) -> Example:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.spec.items()} | {"_mask": np.False_}


def load_example(source: Source, preprocess: Preprocess, index: int, rng: np.random.Generator) -> Example:
    """One example through the host part of preprocessing.

    Raises:
        DataError: the example cannot be read or decoded; the message names it.
    """
    try:
        features = source[index]
    except (OSError, ValueError) as error:
        raise DataError(f"example {index}: {error}") from error
    try:
        return preprocess.host(features, rng)
    except ConfigError:
        raise
    except Exception as error:
        raise DataError(f"{features.get('id', index)}: {error}") from error


def error_share(skip_errors: bool | float) -> float:
    """The setting `skip_errors` as the share of examples that may be unreadable.

    Raises:
        ConfigError: the setting is no share.
    """
    if not 0 <= skip_errors < 1 and skip_errors is not True:
        raise ConfigError("skip_errors", f"is a share in [0, 1), or True for 1 %, got {skip_errors}")
    return 0.01 if skip_errors is True else float(skip_errors)


def example_spec(source: Source, preprocess: Preprocess, skip_errors: bool | float) -> Spec:
    """Shapes and dtypes of a preprocessed example, from the first one that can be read."""
    attempts = min(len(source), 100 if skip_errors else 1)
    for index in range(attempts):
        try:
            example = load_example(source, preprocess, index, np.random.default_rng(0))
        except DataError as error:
            if attempts == 1:
                raise
            if index + 1 == attempts:
                raise DataError(f"not one of the first {attempts} examples could be read: {error}") from error
        else:
            return {name: (array.shape, array.dtype) for name, array in example.items()}
    raise DataError("the data source is empty")


def check_example(preprocess: Preprocess, spec: Spec, num_classes: int, path: str) -> tuple[int, ...]:
    """What preprocessing makes of an example: an image for the model, and labels for the loss.

    Args:
        preprocess: preprocessing parsed from the setting at `path`.
        spec: shape and dtype of each array of an example, from `example_spec`.
        num_classes: width of the model's head.
        path: name of the setting, for errors.

    Returns:
        The shape of an image, [y x c].

    Raises:
        ConfigError: the image is not there or not float32 on the device, or there are no one-hot labels.
    """
    shape, dtype = spec.get("image", ((), None))
    if len(shape) != 3 or dtype != np.uint8:
        raise ConfigError(path, f"must end with a uint8 image [y x c] on the host, got {dtype} {shape}")
    batch = {name: jax.ShapeDtypeStruct((1, *s), d) for name, (s, d) in spec.items()}
    out = jax.eval_shape(preprocess.device, {**batch, "_mask": jax.ShapeDtypeStruct((1,), bool)})
    if "image" not in out or out["image"].dtype != np.float32:
        raise ConfigError(path, "must hand the model a float32 image; add value_range(-1, 1), and keep 'image'")
    if "labels" not in out or out["labels"].shape != (1, num_classes):
        raise ConfigError(path, f"must make one-hot labels of {num_classes} classes; end it with onehot({num_classes})")
    return shape


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches of one source, for one process of a run.

    Attributes:
        config: the block `config.input`, or that of an evaluator.
        source: source of the raw examples.
        preprocess: preprocessing parsed from the block's string.
        rows: numbers of the rows of a global batch that this process loads, see `dist.local_rows`.
    """

    config: LoaderConfig
    source: Source
    preprocess: Preprocess
    rows: np.ndarray

    def __post_init__(self):
        if self.config.repeats > 1 and not self._order.steps_per_epoch:
            raise ConfigError("config.input.repeats", f"needs an epoch of at least a batch of {self.config.batch_size} "
                              f"after rounding to 256 examples, and there are {len(self.source)}; leave it at 1")

    @functools.cached_property
    def spec(self) -> Spec:
        """Shape and dtype of each array of an example as the host delivers it; the first one is read for it, once."""
        return example_spec(self.source, self.preprocess, self.config.skip_errors)

    @property
    def _order(self) -> RepeatedOrder:
        cfg = self.config
        return RepeatedOrder(len(self.source), cfg.batch_size, cfg.virtual_ranks, cfg.repeats)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The label of each example, int64 [n]; -1: it has none. They may have to be read, once.

        Raises:
            DataError: an example cannot be read, and `skip_errors` is not set.
        """
        return labels_of(self.source, bool(self.config.skip_errors))

    @property
    def examples_per_epoch(self) -> int:
        """Examples in an epoch of training: all; or with repeats, those of DeiT's whole batches."""
        if self.config.repeats == 1:
            return len(self.source)
        return self._order.steps_per_epoch * self.config.batch_size

    def train(self, seed: int, start_step: int, total_steps: int) -> Batches:
        """Batches [len(rows) ...] of steps `start_step` to `total_steps` - 1.

        Each epoch is a permutation of its own of all examples; epochs follow each other without a
        gap, so a batch may hold the end of one and the beginning of the next; with repeats, `RepeatedOrder` holds.
        """
        return self._batches(self.order(seed), _fold(seed, "augment"), start_step, total_steps)

    def order(self, seed: int) -> grain.MapDataset:
        """The global order of training: position → index in the source."""
        if self.config.balance:
            order = BalancedOrder(self.labels, self.config.balance, _fold(seed, "shuffle"))
        else:
            order = grain.MapDataset.range(len(self.source)).shuffle(seed=_fold(seed, "shuffle")).repeat()
        return Reordered(order, self._order) if self.config.repeats > 1 else order

    def evaluate(self, seed: int = 0) -> Batches:
        """Every example exactly once, in the source's order; the last batch is filled up with masked rows.

        Args:
            seed: seed of what is drawn for each example.
        """
        size = self.config.batch_size
        steps = -(-len(self.source) // size)
        index = grain.MapDataset.range(steps * size).map(_PadAfter(len(self.source)))
        return self._batches(index, seed, 0, steps)

    def _batches(self, order: grain.MapDataset, seed: int, start_step: int, total_steps: int) -> Batches:
        cfg = self.config
        loader = Loader(self.source, self.preprocess, self.spec, cfg.skip_errors)
        examples = order.random_map(loader, seed=seed)
        batches = Rows(examples, self.rows, cfg.batch_size, total_steps).batch(len(self.rows))[start_step:]
        if not len(batches):
            return
        ahead = max(cfg.prefetch, cfg.num_threads)
        ds = batches.to_iter_dataset(grain.ReadOptions(num_threads=cfg.num_threads, prefetch_buffer_size=ahead))
        if cfg.num_workers:
            allow_unparsed_flags()
            workers = min(cfg.num_workers, len(batches))
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=cfg.prefetch)
            ds = ds.mp_prefetch(options, worker_init_fn=LiveWithParent(os.getpid()))
        with contextlib.closing(iter(ds)) as loaded:
            try:
                yield from loaded
            except RuntimeError as error:
                if ended := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error)):
                    raise why_ended(int(ended[1])) from None
                raise


def to_device(batches: Batches, rows: np.ndarray, sharding: NamedSharding, batch_size: int,
              ahead: int = 2) -> Generator[dict[str, jax.Array], None, None]:
    """Global batches on the devices, `ahead` of them under way while one is computed on.

    Args:
        batches: this process's rows of each batch, as `Pipeline` yields them; closed with this generator.
        rows: numbers of these rows in a global batch.
        sharding: sharding of a global batch.
        batch_size: number of rows of a global batch.
        ahead: number of batches sent before they are asked for.
    """
    sent: collections.deque[dict[str, jax.Array]] = collections.deque()
    with contextlib.closing(batches):
        for batch in batches:
            sent.append(dist.to_global(batch, rows, sharding, batch_size))
            if len(sent) > ahead:
                yield sent.popleft()
        yield from sent


@dataclasses.dataclass(frozen=True)
class _PadAfter:
    """Positions past the end of a source are padding."""

    length: int

    def __call__(self, index: int) -> int:
        return index if index < self.length else PADDING


def _fold(seed: int, stream: str) -> int:
    """A 32-bit seed for one stream; hashed, since Grain adds the epoch to it and neighbours would share orders."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:4], "little")
