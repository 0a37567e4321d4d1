"""Predictions on whole splits, and their metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorax import data
from lorax.train.metrics import evaluate
from lorax.train.setup import Dataset, Setup
from lorax.train.step import example_losses, predict

Forward = Callable[[dict[str, np.ndarray]], Any]


def predict_split(
    forward: Forward, dataset: Dataset, encoded: data.Encoded, batch_size: int
) -> np.ndarray:
    """Outputs for a whole split in its order: (..., n, outputs).

    Args:
      forward: from a batch of B rows to (..., B, outputs); the leading axes are the lanes.
      dataset: its edges and padding.
      encoded: the split.
      batch_size: rows a forward pass.
    """
    batches = data.eval_batches(encoded.lengths, batch_size)
    outputs = []
    for indices in batches:
        batch = data.collate(encoded, indices, batch_size, dataset.edges, dataset.pad_id)
        outputs.append(forward(batch)[..., : len(indices), :])
    order = np.argsort(np.concatenate(batches), kind="stable")
    return np.concatenate(outputs, axis=-2)[..., order, :]


def score(dataset: Dataset, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Loss and metrics on every dev split, from its outputs (n, outputs).

    Names of further splits carry their suffix: MNLI has `accuracy` and `accuracy_mismatched`.
    """
    task = dataset.task
    results: dict[str, float] = {}
    for n, (name, encoded) in enumerate(dataset.dev.items()):
        suffix = "" if n == 0 else "_" + name.removeprefix("dev_")
        losses = example_losses(task.kind, outputs[name], encoded.labels)
        metrics = evaluate(task.metrics, task.kind, outputs[name], encoded.labels)
        metrics["loss"] = float(np.mean(losses))
        results |= {metric + suffix: value for metric, value in metrics.items()}
    return results


def predict_all(
    setup: Setup, dataset: Dataset, encoded: data.Encoded, trainable: Any, batch_size: int
) -> np.ndarray:
    """Outputs of one trial for a whole split, (n, outputs), in the split's order."""

    def forward(batch: dict[str, np.ndarray]) -> Any:
        return predict(setup.program, trainable, setup.frozen, batch)

    return predict_split(forward, dataset, encoded, batch_size)
