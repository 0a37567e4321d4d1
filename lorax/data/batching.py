"""Batches of like lengths in few shapes: pure functions of lengths, seed and epoch."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from lorax.data.shuffle import permutation, shuffled
from lorax.data.tokenize import Encoded
from lorax.errors import LoraxError


def bucket_lengths(
    lengths: Sequence[int] | np.ndarray, max_shapes: int = 4, multiple: int = 8
) -> tuple[int, ...]:
    """Chooses the sequence lengths that batches are padded to.

    The edges minimise the number of tokens after each length is padded to the next edge.

    Args:
      lengths: tokens an example, of all splits that share the edges.
      max_shapes: most edges.
      multiple: every edge is a multiple of this.

    Returns:
      At most `max_shapes` ascending edges; the last one covers the longest example.

    Raises:
      LoraxError: no lengths, or a bound below 1.

    >>> bucket_lengths([5, 6, 7, 30, 31, 100], max_shapes=3)
    (8, 32, 104)
    """
    _at_least_one(max_shapes=max_shapes, multiple=multiple, examples=len(lengths))
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    edges, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: least padded tokens of the j shortest edges' examples; path[j]: how.
    cost = np.concatenate([[0.0], np.full(len(edges), np.inf)])
    path: list[tuple[int, ...]] = [()] * (len(edges) + 1)
    for _ in range(min(max_shapes, len(edges))):
        step = cost[:, None] + (below[None, 1:] - below[:, None]) * edges
        step = np.where(np.arange(len(edges)) >= np.arange(len(edges) + 1)[:, None], step, np.inf)
        start = step.argmin(axis=0)
        path = [(), *(path[i] + (int(edges[j]),) for j, i in enumerate(start))]
        cost = np.concatenate([[0.0], step.min(axis=0)])
    return path[-1]


def train_batches(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    window: int = 8,
) -> list[np.ndarray]:
    """Cuts one epoch into batches; each example is in exactly one.

    The shuffled examples are cut into windows of `window` batches, sorted by length inside and
    cut into batches, which are then shuffled by the epoch alone: at any step, trials of all seeds
    have batches of like lengths, so that they can share a program. The last batch of the last
    window may be partial.

    Args:
      lengths: tokens an example.
      batch_size: examples a batch.
      seed: of the trial; with `epoch` it fixes the result on every machine.
      epoch: counts from zero.
      window: 1 is plain random order.

    Returns:
      Index arrays.

    Raises:
      LoraxError: a size below 1, or a negative seed or epoch.
    """
    _at_least_one(batch_size=batch_size, length_window=window)
    if seed < 0 or epoch < 0:
        raise LoraxError(f"seed={seed} and epoch={epoch} must not be negative")
    lengths = np.asarray(lengths)
    order = permutation(len(lengths), seed, epoch, 0)
    size = window * batch_size
    windows = [order[i : i + size] for i in range(0, len(order), size)]
    by_length = [w[np.argsort(lengths[w], kind="stable")] for w in windows]
    batches = [batch for w in by_length for batch in _cut(w, batch_size)]
    return shuffled(batches, epoch, 1)


def eval_batches(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cuts a split into batches in order of length; the last one may be partial.

    >>> [batch.tolist() for batch in eval_batches([9, 3, 5], 2)]
    [[1, 2], [0]]
    """
    _at_least_one(eval_batch_size=batch_size)
    return _cut(np.argsort(np.asarray(lengths), kind="stable"), batch_size)


def collate(
    encoded: Encoded,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    edges: Sequence[int],
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """Pads a batch to the smallest edge that holds it, and to `batch_size` rows.

    Filler rows have weight 0; they attend to one padding token, so that softmax stays finite.

    Args:
      encoded: the split.
      indices: at most `batch_size` examples.
      batch_size: rows B.
      edges: ascending, from `bucket_lengths`.
      pad_id: token id of the padding.

    Returns:
      `input_ids`, `token_type_ids` and `attention_mask` (B, T) int32, `labels` (B,), and
      `weights` (B,) float32.

    Raises:
      LoraxError: too many examples, or one longer than the last edge.
    """
    rows, longest = len(indices), max((len(encoded.input_ids[i]) for i in indices), default=0)
    if rows > batch_size:
        raise LoraxError(f"{rows} examples do not fit into a batch of {batch_size}")
    if longest > edges[-1]:
        raise LoraxError(f"an example of {longest} tokens is longer than the last edge {edges[-1]}")
    shape = batch_size, edges[bisect_left(edges, longest)]
    batch = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "labels": np.zeros(batch_size, encoded.labels.dtype),
        "weights": (np.arange(batch_size) < rows).astype(np.float32),
    }
    for row, i in enumerate(indices):
        n = len(encoded.input_ids[i])
        batch["input_ids"][row, :n] = encoded.input_ids[i]
        batch["token_type_ids"][row, :n] = encoded.token_type_ids[i]
        batch["attention_mask"][row, :n] = 1
    batch["attention_mask"][rows:, 0] = 1
    batch["labels"][:rows] = encoded.labels[np.asarray(indices)]
    return batch


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise LoraxError(f"{name}={value} must be at least 1")
