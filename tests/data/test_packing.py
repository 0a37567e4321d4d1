from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Encoded, choose_layout, collate_alike, fit, place
from lorax.data.batches.packing import cheapest_edges
from lorax.errors import LoraxError

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def encoded_of(lengths):
    """Examples whose token ids tell them apart: the n-th has 1000 n, 1000 n + 1, ..."""
    ids = [1000 * n + np.arange(length, dtype=np.int32) for n, length in enumerate(lengths, 1)]
    return Encoded(ids, [x % 2 for x in ids], np.arange(len(ids), dtype=np.float32))


@given(lengths_of, st.integers(40, 90))
def test_each_example_is_in_one_row_and_no_row_overflows(lengths, row_length):
    rows = fit(lengths, row_length)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= row_length for row in rows)


@given(lengths_of, st.integers(40, 90))
def test_best_fit_needs_few_rows(lengths, row_length):
    """Of two rows' examples one at least did not fit into the other: all but one are half full."""
    used = sorted(sum(lengths[n] for n in row) for row in fit(lengths, row_length))
    assert all(a + b > row_length for a, b in pairwise(used))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4))
def test_edges_are_the_cheapest(values, most):
    largest = max(values)

    def cost(edges):
        return sum(min(edge for edge in edges if edge >= n) for n in values)

    best = min(
        cost((*chosen, largest))
        for k in range(most)
        for chosen in combinations(range(1, largest), k)
    )
    edges = cheapest_edges(values, most)
    assert cost(edges) == best
    assert len(edges) <= most and list(edges) == sorted(set(edges)) and edges[-1] == largest


@given(lengths_of, st.integers(1, 20), st.integers(1, 5), st.sampled_from([1, 2, 8]))
def test_a_layout_takes_any_batch(lengths, batch_size, max_shapes, multiple):
    layout = choose_layout(lengths, batch_size, max_shapes=max_shapes, multiple=multiple)
    assert max(lengths) <= layout.row_length < 1.25 * max(lengths) + 8
    assert layout.row_length % 8 == 0
    assert list(layout.rows) == sorted(set(layout.rows))
    assert all(rows % multiple == 0 for rows in layout.rows)
    assert len(layout.rows) <= max_shapes + 1 and layout.rows[-1] >= batch_size
    assert sum(layout.shares.values()) == pytest.approx(1)
    longest = np.sort(lengths)[::-1][:batch_size]  # the batch that needs the most rows
    needed = len(fit(longest, layout.row_length))
    assert needed <= layout.rows_for(needed) <= layout.rows[-1]


def test_a_layout_wastes_little_and_does_not_change():
    lengths = 4 + np.random.PCG64(1).random_raw(5000) % 29
    layout = choose_layout(lengths, 32)
    assert (layout.row_length, layout.rows) == (32, (18, 20, 22, 27, 32))
    tokens = sum(rows * share for rows, share in layout.shares.items()) * layout.row_length
    assert 32 * lengths.mean() / tokens > 0.85


@given(lengths_of, st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_packed_batch_holds_its_examples(lengths, parts, random):
    encoded = encoded_of(lengths)
    size = 4 * parts
    layout = choose_layout(lengths, 4)
    chosen = [random.sample(range(len(lengths)), min(n, len(lengths))) for n in (1, size)]
    batches = collate_alike(encoded, list(map(np.asarray, chosen)), layout, parts=parts, pad_id=7)
    assert len({batch["input_ids"].shape for batch in batches}) == 1
    for batch, indices in zip(batches, chosen, strict=True):
        assert {x.dtype for name, x in batch.items() if name not in ("labels", "weights")} == {
            np.dtype(np.int32)
        }
        rows = len(batch["input_ids"]) // parts
        micro = [
            {name: x[n * len(x) // parts : (n + 1) * len(x) // parts] for name, x in batch.items()}
            for n in range(parts)
        ]
        assert [len(part["input_ids"]) for part in micro] == [rows] * parts
        assert [len(part["labels"]) for part in micro] == [4] * parts
        found = [example for part in micro for example in examples_in(part)]
        assert found == [
            (encoded.input_ids[i].tolist(), encoded.token_type_ids[i].tolist(), encoded.labels[i])
            for i in indices
        ]
        padding = batch["segment_ids"] == 0
        assert (batch["input_ids"][padding] == 7).all()
        assert padding.sum() == padding.size - sum(lengths[i] for i in indices)
        assert batch["weights"].sum() == len(indices)


def examples_in(batch):
    """What a batch says of each of its examples: (ids, types, label)."""
    segments, flat_ids = batch["segment_ids"], batch["input_ids"].ravel()
    for n in np.flatnonzero(batch["weights"]):
        row, places = np.nonzero(segments == n + 1)
        assert len(set(row)) == 1 and (np.diff(places) == 1).all()  # in one row, in one piece
        own = segments == n + 1
        assert batch["position_ids"][own].tolist() == list(range(len(places)))
        ids = batch["input_ids"][own]
        assert flat_ids[batch["first_tokens"][n]] == ids[0]
        yield ids.tolist(), batch["token_type_ids"][own].tolist(), batch["labels"][n]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_layout([], 4), "examples=0 must be at least 1"),
        (lambda: choose_layout([3], 0), "batch_size=0"),
        (lambda: choose_layout([3], 4, max_shapes=0), "max_shapes=0"),
        (lambda: fit([3, 9], 8), "example of 9 tokens is longer than a row of 8"),
        (
            lambda: collate_alike(encoded_of([1] * 5), [np.arange(5)], choose_layout([1], 4)),
            "5 examples do not fit into a batch of 4",
        ),
    ],
)
def test_faults(call, message):
    with pytest.raises(LoraxError, match=message):
        call()


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(9, 14),
)
def test_many_batches_are_placed_as_each_alone(lengths, row_length):
    starts, rows = place(np.array(lengths), row_length)
    for own, found, needed in zip(lengths, starts, rows, strict=True):
        there = [n for n in range(len(own)) if own[n]]
        placed = fit([own[n] for n in there], row_length)
        assert needed == len(placed)
        for row, members in enumerate(placed):
            column = 0
            for member in members:
                n = there[member]
                assert found[n] == row * row_length + column
                column += own[n]


def test_few_steps_get_few_shapes():
    """One more shape has to save more than it takes to compile."""
    lengths = np.random.default_rng(0).integers(1, 33, 500)
    layouts = [choose_layout(lengths, 8, steps=steps) for steps in (1, 60, 10_000, None)]
    counts = [len(layout.shares) for layout in layouts]
    assert counts[0] == 1 and counts == sorted(counts) and counts[-1] == 4
    assert layouts[-1] == layouts[-2] == choose_layout(lengths, 8)


def test_an_example_longer_than_a_row_is_not_placed():
    with pytest.raises(LoraxError, match="an example of 9 tokens is longer than a row of 8"):
        place(np.array([[3, 9]]), 8)
