"""Predictions on whole splits, and their metrics."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from lorax import data
from lorax.train.dataset import Dataset
from lorax.train.indexed_batch import BatchShape, DeviceSplit, IndexedBatch, device_split
from lorax.train.metrics import evaluate
from lorax.train.setup import Setup
from lorax.train.step import example_losses, predict

Forward = Callable[[IndexedBatch], Any]


def predict_split(
    forward: Forward,
    dataset: Dataset,
    encoded: data.Encoded,
    batch_size: int,
    split: DeviceSplit | None = None,
) -> np.ndarray:
    """Outputs for a whole split in its order: (..., n, outputs).

    Args:
      forward: from a batch of N examples to (..., N, outputs); the leading axes are the lanes.
      dataset: its row length and padding.
      encoded: the split.
      batch_size: mean number of examples in a forward pass.
      split: the split on the device; None puts it there.
    """
    batches = list(batches_of(encoded, batch_size, dataset, split or device_split(encoded)))
    outputs = [forward(batch)[..., : len(indices), :] for indices, batch in batches]
    order = np.argsort(np.concatenate([indices for indices, _ in batches]), kind="stable")
    return np.concatenate(outputs, axis=-2)[..., order, :]


def batches_of(
    encoded: data.Encoded, batch_size: int, dataset: Dataset, split: DeviceSplit
) -> Iterator[tuple[np.ndarray, IndexedBatch]]:
    """The batches of an evaluation, each with its examples.

    Args:
      encoded: the split.
      batch_size: mean number of examples in a batch.
      dataset: its row length and padding.
      split: the split on the device.
    """
    row_length, multiple = dataset.layout.row_length, dataset.multiple
    rows, planned = _planned(encoded, batch_size, row_length, multiple)
    shape = BatchShape(1, rows, row_length, dataset.pad_id)
    for indices, examples, starts in planned:
        yield indices, IndexedBatch(split, examples, starts, shape)


@lru_cache(maxsize=16)
def _planned(
    encoded: data.Encoded, batch_size: int, row_length: int, multiple: int
) -> tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(rows of every batch; for each batch its examples, the same padded with -1, their starts)."""
    layout, batches = data.eval_plan(encoded, batch_size, row_length, multiple)
    found = []
    for indices, placed in batches:
        examples = np.full(layout.examples, -1, np.int32)
        examples[: len(indices)] = indices
        starts = np.zeros(layout.examples, np.int32)
        for row, members in enumerate(placed):
            ends = np.cumsum(encoded.lengths[indices[members]])
            starts[members] = row * row_length + ends - encoded.lengths[indices[members]]
        found.append((indices, examples, starts))
    return layout.rows[0], found


def score(dataset: Dataset, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Loss and metrics on every dev split, from its outputs (n, outputs).

    Metrics of further splits have a suffix: MNLI has `accuracy` and `accuracy_mismatched`.
    """
    task = dataset.task
    results: dict[str, float] = {}
    for n, (name, encoded) in enumerate(dataset.dev.items()):
        suffix = "" if n == 0 else "_" + name.removeprefix("dev_")
        losses, counts = example_losses(task.kind, outputs[name], encoded.labels)
        metrics = evaluate(task.metrics, task.kind, outputs[name], encoded.labels)
        metrics["loss"] = float(np.asarray(losses).sum(dtype=np.float64) / np.asarray(counts).sum())
        results |= {metric + suffix: value for metric, value in metrics.items()}
    return results


def predict_all(
    setup: Setup, dataset: Dataset, encoded: data.Encoded, trainable: Any, batch_size: int
) -> np.ndarray:
    """Outputs of one trial for a whole split, (n, outputs), in the split's order."""

    def forward(batch: IndexedBatch) -> Any:
        return predict(setup.program, trainable, setup.frozen, batch)

    return predict_split(forward, dataset, encoded, batch_size)
