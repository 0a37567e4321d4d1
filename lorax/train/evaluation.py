"""Predictions on whole splits, and their metrics."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax import data
from lorax.train.dataset import Dataset
from lorax.train.indexed_batch import BatchShape, IndexedBatch, device_split
from lorax.train.metrics import evaluate
from lorax.train.setup import Setup
from lorax.train.step import example_losses, predict

Forward = Callable[[IndexedBatch], Any]


def predict_split(
    forward: Forward,
    dataset: Dataset,
    encoded: data.Encoded,
    batch_size: int,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Outputs for a whole split in its order: (..., n, outputs).

    Args:
      forward: from a batch of N examples to (..., N, outputs); the leading axes are the lanes.
      dataset: its row length and padding.
      encoded: the split.
      batch_size: examples a forward pass, on average.
      mesh: where `forward` computes; None is one device.
    """
    batches = _batches(encoded, batch_size, dataset, mesh)
    outputs = [forward(batch)[..., : len(indices), :] for indices, batch in batches]
    order = np.argsort(np.concatenate([indices for indices, _ in batches]), kind="stable")
    return np.concatenate(outputs, axis=-2)[..., order, :]


@lru_cache(maxsize=16)
def _batches(
    encoded: data.Encoded, batch_size: int, dataset: Dataset, mesh: Mesh | None
) -> list[tuple[np.ndarray, IndexedBatch]]:
    """The batches of an evaluation, and the examples that each holds."""
    row_length = dataset.layout.row_length
    layout, batches = data.eval_plan(encoded, batch_size, row_length, dataset.multiple)
    split = device_split(encoded, mesh)
    shape = BatchShape(1, layout.rows[0], row_length, dataset.pad_id)
    found = []
    for indices, placed in batches:
        examples = np.full(layout.examples, -1, np.int32)
        examples[: len(indices)] = indices
        starts = np.zeros(layout.examples, np.int32)
        for row, members in enumerate(placed):
            ends = np.cumsum(encoded.lengths[indices[members]])
            starts[members] = row * row_length + ends - encoded.lengths[indices[members]]
        found.append((indices, IndexedBatch(split, examples, starts, shape)))
    return found


def score(dataset: Dataset, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Loss and metrics on every dev split, from its outputs (n, outputs).

    Names of further splits carry their suffix: MNLI has `accuracy` and `accuracy_mismatched`.
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
