"""The work of a trial: its data, shapes, steps, and FLOPs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorax import data
from lorax.config import TrialConfig
from lorax.lora.paths import leaves_by_path
from lorax.train.dataset import Dataset, epoch_steps, load_dataset, total_steps
from lorax.train.indexed_batch import BatchShape, DeviceSplit, IndexedBatch, device_split
from lorax.train.setup import frozen_shapes


@dataclass(frozen=True)
class Workload:
    """The work of a trial; the adapter's own share is `lorax.sweep.cost.Size`.

    Attributes:
      config: the trial.
      dataset: its data, tokenized.
    """

    config: TrialConfig
    dataset: Dataset

    @classmethod
    def of(cls, config: TrialConfig) -> "Workload":
        """The work of a trial.

        Raises:
          LoraxError: data that cannot be read.
        """
        return cls(config, load_dataset(config))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole trial."""
        return total_steps(self.config, self.dataset)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return epoch_steps(self.config, self.dataset)

    @property
    def shapes(self) -> dict[int, float]:
        """Each compiled shape's share of the steps, by the rows of its micro-batches."""
        return self.dataset.layout.shares

    def tokens(self, rows: int) -> int:
        """Tokens of a step whose micro-batches have `rows` rows; padding counts."""
        return self.config.train.grad_accum * rows * self.dataset.layout.row_length

    @cached_property
    def tokens_per_step(self) -> float:
        """Mean tokens of a step; padding counts."""
        return sum(self.tokens(rows) * share for rows, share in self.shapes.items())

    @cached_property
    def evaluations(self) -> int:
        """Number of evaluations; the last one is at the end."""
        every = self.config.train.eval_every or self.steps_per_epoch
        return -(-self.steps // every)

    @cached_property
    def evaluation_tokens(self) -> int:
        """Tokens of an evaluation; padding counts."""
        total, length = 0, self.dataset.layout.row_length
        for encoded in self.dataset.dev.values():
            size = self.config.train.eval_batch_size
            layout, batches = data.eval_plan(encoded, size, length, self.dataset.multiple)
            total += len(batches) * layout.rows[0] * length
        return total

    @cached_property
    def base_flops(self) -> float:
        """FLOPs per token in the frozen base's products: forward, and back to activations."""
        leaves = leaves_by_path(frozen_shapes(self.config))
        products = [leaf for path, leaf in leaves.items() if path.endswith(".kernel")]
        if "lm_head.kernel" not in leaves and (table := leaves.get("decoder.word.embedding")):
            products.append(table)  # the output layer, too
        return 4.0 * sum(leaf.size for leaf in products)

    def dummy_batch(
        self, rows: int, lanes: int | None = None, split: DeviceSplit | None = None
    ) -> IndexedBatch:
        """A batch whose micro-batches have `rows` rows, each with the shortest example.

        Args:
          rows: of a micro-batch.
          lanes: K, for one batch per lane; None for no lane axis.
          split: the training split on the device; None puts it there.
        """
        train, layout = self.dataset.train, self.dataset.layout
        parts, count = self.config.train.grad_accum, min(rows, layout.examples)
        examples = np.full((parts, layout.examples), -1, np.int32)
        examples[:, :count] = np.argmin(train.lengths)
        starts = np.zeros((parts, layout.examples), np.int32)
        starts[:, :count] = layout.row_length * np.arange(count)
        axes = () if lanes is None else (lanes,)
        shape = BatchShape(parts, rows, layout.row_length, self.dataset.pad_id)
        return IndexedBatch(
            split or device_split(train),
            np.broadcast_to(examples.ravel(), (*axes, examples.size)),
            np.broadcast_to(starts.ravel(), (*axes, starts.size)),
            shape,
        )
