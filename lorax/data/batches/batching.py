"""The examples of each batch: pure functions of sizes, seed and epoch."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lorax.data.batches.packing import Layout, Rows, at_least_one, fit, round_up
from lorax.data.batches.shuffle import permutation
from lorax.data.tokens.tokenize import Encoded
from lorax.errors import LoraxError


def train_batches(count: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Split one epoch into batches in random order; each example is in exactly one.

    Args:
      count: examples in the split.
      batch_size: examples per batch; the last batch may be partial.
      seed: of the trial; with `epoch` it determines the result on every machine.
      epoch: counts from zero.

    Returns:
      Index arrays.

    Raises:
      LoraxError: a size below 1, or a negative seed or epoch.
    """
    at_least_one(batch_size=batch_size)
    if seed < 0 or epoch < 0:
        raise LoraxError(f"seed={seed} and epoch={epoch} must not be negative")
    order = permutation(count, seed, epoch, 0)
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


class EvalPlan(NamedTuple):
    """A split in packed batches of one shape.

    Attributes:
      layout: its `rows` has one entry.
      batches: for each batch (indices of the split, for each row the places in these).
    """

    layout: Layout
    batches: list[tuple[np.ndarray, Rows]]


@lru_cache(maxsize=16)
def eval_plan(encoded: Encoded, batch_size: int, row_length: int, multiple: int = 1) -> EvalPlan:
    """Pack a whole split, with examples of all lengths in each batch.

    Args:
      encoded: the split.
      batch_size: mean number of examples per batch.
      row_length: tokens per row.
      multiple: rows and examples of a batch are multiples of this.

    Raises:
      LoraxError: a size below 1, or an example longer than a row.
    """
    at_least_one(eval_batch_size=batch_size, examples=len(encoded))
    placed = fit(encoded.lengths, row_length)
    count = -(-len(encoded) // batch_size)
    shares = [placed[n::count] for n in range(min(count, len(placed)))]
    batches = [_renumbered(rows) for rows in shares]
    rows = round_up(max(map(len, shares)), multiple)
    examples = round_up(max(len(indices) for indices, _ in batches), multiple)
    return EvalPlan(Layout(row_length, (rows,), examples), batches)


def _renumbered(rows: Rows) -> tuple[np.ndarray, Rows]:
    indices = [n for row in rows for n in row]
    ends = np.cumsum([len(row) for row in rows]).tolist()
    return np.asarray(indices), [
        list(range(end - len(row), end)) for row, end in zip(rows, ends, strict=True)
    ]


def pad(
    encoded: Encoded, indices: np.ndarray, pad_id: int = 0, length: int | None = None
) -> dict[str, np.ndarray]:
    """A batch with one example per row, as in other libraries.

    Args:
      encoded: the split.
      indices: its examples, B in number.
      pad_id: token id of the padding.
      length: tokens per row T; None for the length of the longest example.

    Returns:
      `input_ids`, `token_type_ids` and `attention_mask` (B, T) int32; `labels` and `weights`,
      all 1, (B,).
    """
    indices = np.asarray(indices)
    length = length or int(encoded.lengths[indices].max())
    batch = {
        "input_ids": np.full((len(indices), length), pad_id, np.int32),
        "token_type_ids": np.zeros((len(indices), length), np.int32),
        "attention_mask": np.zeros((len(indices), length), np.int32),
        "labels": encoded.labels[indices],
        "weights": np.ones(len(indices), np.float32),
    }
    for row, i in enumerate(indices):
        n = len(encoded.input_ids[i])
        batch["input_ids"][row, :n] = encoded.input_ids[i]
        batch["token_type_ids"][row, :n] = encoded.token_type_ids[i]
        batch["attention_mask"][row, :n] = 1
    return batch
