"""Predictions on whole splits, and their metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorax import data
from lorax.train.dataset import Dataset
from lorax.train.metrics import evaluate
from lorax.train.setup import Setup
from lorax.train.step import example_losses, predict

Forward = Callable[[dict[str, np.ndarray]], Any]


def predict_split(
    forward: Forward, dataset: Dataset, encoded: data.Encoded, batch_size: int
) -> np.ndarray:
    """Outputs for a whole split in its order: (..., n, outputs).

    Args:
      forward: from a packed batch of N examples to (..., N, outputs); the leading axes are the
        lanes.
      dataset: its row length and padding.
      encoded: the split.
      batch_size: examples a forward pass, on average.
    """
    row_length = dataset.layout.row_length
    layout, batches = data.eval_plan(encoded, batch_size, row_length, dataset.multiple)
    (rows,) = layout.rows
    outputs = []
    for indices, placed in batches:
        batch = data.collate(encoded, indices, placed, layout, rows=rows, pad_id=dataset.pad_id)
        outputs.append(forward(batch)[..., : len(indices), :])
    order = np.argsort(np.concatenate([indices for indices, _ in batches]), kind="stable")
    return np.concatenate(outputs, axis=-2)[..., order, :]


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

    def forward(batch: dict[str, np.ndarray]) -> Any:
        return predict(setup.program, trainable, setup.frozen, batch)

    return predict_split(forward, dataset, encoded, batch_size)
