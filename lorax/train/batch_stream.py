"""The order of training: the examples in each run's next batch, and their places."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorax import data
from lorax.config import TrainConfig
from lorax.train.dataset import Dataset
from lorax.train.indexed_batch import BatchShape, DeviceSplit, IndexedBatch, device_split

BLOCK = 64  # steps planned together


@dataclass(frozen=True)
class _Block:
    """Steps that are planned; axes are (step, seed, P * N), and (step,) for rows."""

    first: int
    examples: np.ndarray
    starts: np.ndarray
    rows: np.ndarray


class BatchStream:
    """The batches of runs in lockstep: a pure function of their seeds and the step.

    Runs with the same seed have the same batches. All batches of a step have the same shape, the
    smallest that fits them all.

    Args:
      dataset: of the runs.
      train: batch size and micro-batches, the same for all runs.
      seeds: of the runs, K in number.
      split: the training split on the device; None puts it there.
    """

    def __init__(
        self,
        dataset: Dataset,
        train: TrainConfig,
        seeds: Sequence[int],
        split: DeviceSplit | None = None,
    ):
        self._dataset, self._train = dataset, train
        self._seeds = list(dict.fromkeys(seeds))
        self._of_run = np.asarray([self._seeds.index(seed) for seed in seeds])
        self._split = split or device_split(dataset.train)
        self._steps = -(-len(dataset.train) // train.batch_size)  # an epoch
        self._orders: tuple[int, list[list[np.ndarray]]] | None = None
        self._block: _Block | None = None

    def at(self, step: int) -> IndexedBatch:
        """The batches of a step, the first being 0: (K, P * N) examples and starts."""
        block, layout = self._block, self._dataset.layout
        if block is None or not 0 <= step - block.first < len(block.rows):
            block = self._block = self._plan(step)
        n = step - block.first
        parts = self._train.grad_accum
        shape = BatchShape(parts, int(block.rows[n]), layout.row_length, self._dataset.pad_id)
        of_run = self._of_run
        return IndexedBatch(self._split, block.examples[n][of_run], block.starts[n][of_run], shape)

    def unlike(self, step: int, end: int) -> list[IndexedBatch]:
        """One batch for each shape among the steps planned with `step`, by first use.

        Args:
          step: the first one.
          end: the step to stop before.
        """
        self.at(step)
        assert self._block is not None
        last = min(end, self._block.first + len(self._block.rows))
        found: dict[BatchShape, IndexedBatch] = {}
        for n in range(step, last):
            batch = self.at(n)
            found.setdefault(batch.shape, batch)
        return list(found.values())

    def _plan(self, step: int) -> _Block:
        layout, parts = self._dataset.layout, self._train.grad_accum
        examples = np.full((BLOCK, len(self._seeds), parts * layout.examples), -1, np.int32)
        for n in range(BLOCK):
            epoch, position = divmod(step + n, self._steps)
            for s, batches in enumerate(self._orders_of(epoch)):
                examples[n, s, : len(batches[position])] = batches[position]
        lengths = np.where(examples < 0, 0, self._dataset.train.lengths[examples])
        starts, needed = data.place(lengths.reshape(-1, layout.examples), layout.row_length)
        most = needed.reshape(BLOCK, -1).max(axis=1)
        rows = np.asarray([layout.rows_for(int(n)) for n in most])
        return _Block(step, examples, starts.reshape(examples.shape), rows)

    def _orders_of(self, epoch: int) -> list[list[np.ndarray]]:
        if self._orders is None or self._orders[0] != epoch:
            count, size = len(self._dataset.train), self._train.batch_size
            orders = [data.train_batches(count, size, seed=s, epoch=epoch) for s in self._seeds]
            self._orders = epoch, orders
        return self._orders[1]
