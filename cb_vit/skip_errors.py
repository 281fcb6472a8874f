"""How many examples may be unreadable: the setting `skip_errors`, judged over an epoch or an evaluator's split."""
from __future__ import annotations

import dataclasses

import numpy as np

from cb_vit.datasets import DataError
from cb_vit.input_pipeline import Pipeline, error_share, load_example

JUDGED_FROM = 1000  # examples; the share among fewer says little


@dataclasses.dataclass
class Judge:
    """Counts the unreadable examples of a pipeline, on all hosts, and stops it when there are too many.

    Attributes:
        pipeline: the pipeline whose examples are counted.
        setting: name of the setting that allows unreadable examples, for errors.
        seed: the seed of the training order; None: the pipeline is an evaluator's.
        failed: number of unreadable examples in the present epoch so far.
        last: number (from 1) of the last batch with an unreadable example; None: there was none.
    """

    pipeline: Pipeline
    setting: str
    seed: int | None = None
    failed: int = 0
    last: int | None = None

    def state(self) -> dict[str, int | None]:
        """What a resumed run needs, as JSON values."""
        return {"failed": self.failed, "last": self.last}

    def add(self, step: int, masked: int) -> None:
        """Take account of one batch.

        Args:
            step: number of the batch, from 1.
            masked: how many of its rows hold no example, over all processes.

        Raises:
            DataError: `skip_errors` allows fewer, or the whole batch is lost; names one of the examples.
        """
        batch, examples = self.pipeline.config.batch_size, self.pipeline.examples_per_epoch
        read, ends, padding = self._progress(step, batch, examples)
        failed = masked - padding
        self.failed += failed
        if failed:
            self.last = step
        # At once, whatever share is allowed: there is nothing to learn from in such a batch.
        if failed == batch:
            raise DataError(f"of {batch:,} examples of a batch not one could be read{self._example()}; mend the data")
        share = error_share(self.pipeline.config.skip_errors)
        if (ends or read >= JUDGED_FROM) and self.failed > share * read:
            raise DataError(f"{self.failed:,} of {read:,} examples could not be read{self._example()}; mend the data, "
                            f"or allow more: {self.setting} is {share:g}")
        if ends:
            self.failed = 0

    def _progress(self, step: int, batch: int, examples: int) -> tuple[int, bool, int]:
        """Examples read of the epoch or split, whether that is all of it, and rows that only fill up the batch."""
        if self.seed is None:
            read = min(step * batch, examples)
            return read, read == examples, step * batch - read
        # A batch with the end of one epoch and the beginning of the next counts for the first.
        epoch = (step - 1) * batch // examples
        begun = -(-epoch * examples // batch)  # batches before the first one that counts
        return (step - begun) * batch, step * batch >= (epoch + 1) * examples, 0

    def _example(self) -> str:
        """One of those that this process has met, tried again: what is wrong with it may stand far up in the log."""
        pipeline, step = self.pipeline, self.last
        if step is None:
            return ""
        order = range(len(pipeline.source)) if self.seed is None else pipeline.order(self.seed)
        # Only rows of this process: what others have met stands in their logs.
        for position in map(int, (step - 1) * pipeline.config.batch_size + pipeline.rows):
            try:
                if position < len(order):
                    load_example(pipeline.source, pipeline.preprocess, order[position], np.random.default_rng(0))
            except DataError as error:
                return f", such as {error}"
        return ""
