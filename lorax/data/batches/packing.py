"""Several examples in a row: batches of few shapes, with little padding.

Tokens attend within their own example and count positions from its start, so a packed batch gives
the same outputs as its examples alone.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lorax.data.tokens.tokenize import Encoded
from lorax.errors import LoraxError

DRAWS = 1000  # random batches that the shapes are chosen for
ATTENTION = 400  # at this row length attention costs as much as all products with weights
COMPILATION = 5  # steps that take as long as one more compilation: of a small pack on a CPU
Rows = list[list[int]]


@dataclass(frozen=True)
class Layout:
    """The shapes into which batches of one size are packed.

    Attributes:
      row_length: tokens per row, T; no example is longer.
      rows: numbers of rows R, ascending; the last one fits any batch.
      examples: maximum number of examples per batch, N.
      shares: of random batches, by their number of rows; seldom includes the last of `rows`.
    """

    row_length: int
    rows: tuple[int, ...]
    examples: int
    shares: dict[int, float] = field(default_factory=dict, compare=False)

    def rows_for(self, needed: int) -> int:
        """The smallest number of rows that is at least `needed`."""
        return self.rows[bisect_left(self.rows, needed)]


def fit(lengths: Sequence[int] | np.ndarray, row_length: int) -> Rows:
    """Pack examples into rows by best fit, the longest first.

    Returns:
      The examples' numbers in each row; the number of rows is near the minimum.

    Raises:
      LoraxError: an example longer than a row.

    >>> fit([3, 5, 2, 6], row_length=8)
    [[3, 2], [1, 0]]
    """
    rows: Rows = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for n in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[n])
        if length > row_length:
            raise _too_long(length, row_length)
        at = bisect_left(room, (length, 0))
        if at == len(room):
            rows.append([])
            room.append((row_length, len(rows) - 1))
        left, row = room.pop(at)
        rows[row].append(n)
        insort(room, (left - length, row))
    return rows


def place(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Place the examples of many batches at once, each batch as `fit` does.

    Args:
      lengths: (B, N) tokens of each example; 0 for an example that a partial batch lacks.
      row_length: tokens per row, T.

    Returns:
      (B, N) int32, the place of each example's first token in its batch's concatenated rows;
      and (B,), the number of rows of each batch.

    Raises:
      LoraxError: an example longer than a row.

    >>> place(np.array([[3, 5, 2, 6]]), row_length=8)
    (array([[13,  8,  6,  0]], dtype=int32), array([2]))
    """
    if lengths.max(initial=0) > row_length:
        raise _too_long(int(lengths.max()), row_length)
    batches, count = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    ordered = np.take_along_axis(lengths, order, axis=1).astype(np.int32)
    room = np.full((batches, count), row_length, np.int32)  # of each row; an unused row is empty
    starts = np.empty((batches, count), np.int32)
    every = np.arange(batches)
    for n in range(count):
        length = ordered[:, n]
        row = np.where(room >= length[:, None], room, row_length + 1).argmin(axis=1)
        starts[every, order[:, n]] = (row + 1) * row_length - room[every, row]
        room[every, row] -= length
    return starts, (room < row_length).sum(axis=1)


def _too_long(length: int, row_length: int) -> LoraxError:
    return LoraxError(f"an example of {length} tokens is longer than a row of {row_length}")


def choose_layout(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    *,
    max_shapes: int = 4,
    longest: int | None = None,
    multiple: int = 1,
    steps: int | None = None,
) -> Layout:
    """Chooses the shapes of random batches: those that cost the least work.

    They depend on the lengths and on how many batches there are, not on a trial's seed. They serve
    all batches but one that needs more rows than any of the drawn ones, which takes a row an
    example. A further shape saves padding in each step and costs a compilation, so that few steps
    get few shapes.

    Args:
      lengths: tokens of each example in the split that batches are drawn from.
      batch_size: examples per batch, N.
      max_shapes: maximum number of shapes.
      longest: tokens of the longest example of any split; None: of `lengths`.
      multiple: every number of rows is a multiple of this.
      steps: how many batches; None: so many that compilations do not count.

    Raises:
      LoraxError: no lengths, or a bound below 1.
    """
    lengths = np.asarray(lengths)
    at_least_one(batch_size=batch_size, max_shapes=max_shapes, examples=len(lengths))
    shortest_row = round_up(longest or int(lengths.max()), 8)
    # The raw stream is the same in every release of NumPy.
    size = min(batch_size, len(lengths))
    count = min(DRAWS, 20 + 40 * DRAWS // size)  # large batches vary little
    draws = lengths[np.random.PCG64(0).random_raw((count, size)) % len(lengths)]

    def layouts_of(row_length: int) -> list[Layout]:
        needed = [round_up(int(n), multiple) for n in place(draws, row_length)[1]]
        fewest = 1 if steps else max_shapes
        return [layout_of(row_length, needed, n) for n in range(fewest, max_shapes + 1)]

    def layout_of(row_length: int, needed: list[int], shapes: int) -> Layout:
        edges = cheapest_edges(needed, shapes)
        rows = tuple(dict.fromkeys((*edges, round_up(batch_size, multiple))))
        taken = Counter(rows[bisect_left(rows, n)] for n in needed)
        shares = {n: times / count for n, times in sorted(taken.items())}
        return Layout(row_length, rows, batch_size, shares)

    def work(layout: Layout) -> float:
        compiling = COMPILATION * len(layout.shares) if steps else 0
        return _cost(layout) * ((steps or 1) + compiling)

    layouts = [layout for length in _candidates(shortest_row) for layout in layouts_of(length)]
    return min(layouts, key=work)


def _candidates(shortest: int) -> list[int]:
    """Candidate row lengths: examples may fit much better in somewhat longer rows."""
    return [shortest + 8 * n for n in range(1 + min(shortest // 32, 6))]


def _cost(layout: Layout) -> float:
    """Expected work: products with weights scale with tokens, attention also with row length."""
    tokens = layout.row_length * sum(rows * share for rows, share in layout.shares.items())
    return tokens * (1 + layout.row_length / ATTENTION)


def cheapest_edges(values: Sequence[int], most: int) -> tuple[int, ...]:
    """At most `most` ascending edges that minimize the sum of values rounded up to an edge.

    >>> cheapest_edges([5, 6, 7, 30, 31, 100], most=3)
    (7, 31, 100)
    """
    edges, counts = np.unique(values, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: least sum of the j smallest edges' values, rounded up; path[j]: its edges.
    cost = np.concatenate([[0.0], np.full(len(edges), np.inf)])
    path: list[tuple[int, ...]] = [()] * (len(edges) + 1)
    for _ in range(min(most, len(edges))):
        step = cost[:, None] + (below[None, 1:] - below[:, None]) * edges
        step = np.where(np.arange(len(edges)) >= np.arange(len(edges) + 1)[:, None], step, np.inf)
        start = step.argmin(axis=0)
        path = [(), *(path[i] + (int(edges[j]),) for j, i in enumerate(start))]
        cost = np.concatenate([[0.0], step.min(axis=0)])
    return path[-1]


def collate_alike(
    encoded: Encoded,
    batches: Sequence[np.ndarray],
    layout: Layout,
    *,
    parts: int = 1,
    pad_id: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Pack several batches into the smallest shape that fits all of them; see `collate`.

    Args:
      encoded: the split.
      batches: indices, at most `parts * layout.examples` each.
      layout: the shapes.
      parts: number of micro-batches of each batch, which are packed one by one.
      pad_id: token id of the padding.
    """
    lengths = encoded.lengths
    cut = [_parts(indices, parts, layout.examples) for indices in batches]
    placed = [[fit(lengths[part], layout.row_length) for part in batch] for batch in cut]
    rows = layout.rows_for(max(len(rows) for batch in placed for rows in batch))
    return [
        _joined(
            [
                collate(encoded, part, where, layout, rows=rows, pad_id=pad_id)
                for part, where in zip(batch, places, strict=True)
            ]
        )
        for batch, places in zip(cut, placed, strict=True)
    ]


def _parts(indices: np.ndarray, count: int, size: int) -> list[np.ndarray]:
    """Split a batch into micro-batches; the last ones of a partial batch may be empty."""
    if len(indices) > count * size:
        raise LoraxError(f"{len(indices)} examples do not fit into a batch of {count * size}")
    return [np.asarray(indices)[n * size : (n + 1) * size] for n in range(count)]


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def collate(
    encoded: Encoded,
    indices: np.ndarray,
    placed: Rows,
    layout: Layout,
    *,
    rows: int,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """A packed batch.

    Args:
      encoded: the split.
      indices: its examples, at most N.
      placed: for each row, the places in `indices` of its examples, in order; from `fit`.
      layout: row length T and maximum number of examples N.
      rows: rows R, the last ones empty.
      pad_id: token id of the padding.

    Returns:
      `input_ids`, `token_type_ids`, `position_ids` and `segment_ids` (R, T) int32: a segment is
      an example of the batch, from 1, and 0 is padding. `first_tokens` (N,) int32, the place of
      each example's first token in the concatenated rows; `labels` (N,); `weights` (N,)
      float32, 0 for the examples that a partial batch lacks.
    """
    length, count = layout.row_length, layout.examples
    batch = {
        "input_ids": np.full((rows, length), pad_id, np.int32),
        "token_type_ids": np.zeros((rows, length), np.int32),
        "position_ids": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "first_tokens": np.zeros(count, np.int32),
        "labels": np.zeros(count, encoded.labels.dtype),
        "weights": (np.arange(count) < len(indices)).astype(np.float32),
    }
    for row, members in enumerate(placed):
        start = 0
        for n in members:
            ids = encoded.input_ids[indices[n]]
            span = row, slice(start, start + len(ids))
            batch["input_ids"][span] = ids
            batch["token_type_ids"][span] = encoded.token_type_ids[indices[n]]
            batch["position_ids"][span] = np.arange(len(ids))
            batch["segment_ids"][span] = n + 1
            batch["first_tokens"][n] = row * length + start
            start += len(ids)
    batch["labels"][: len(indices)] = encoded.labels[indices]
    return batch


def round_up(n: int, multiple: int) -> int:
    """The next multiple of a number.

    >>> round_up(9, 8), round_up(8, 8)
    (16, 8)
    """
    return -(-n // multiple) * multiple


def at_least_one(**values: int) -> None:
    """Refuse a count below 1.

    Raises:
      LoraxError: names the count.
    """
    for name, value in values.items():
        if value < 1:
            raise LoraxError(f"{name}={value} must be at least 1")
