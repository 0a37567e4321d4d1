from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Encoded, bucket_lengths, collate, eval_batches, permutation, train_batches
from lorax.errors import LoraxError

lengths_of = st.lists(st.integers(1, 200), min_size=1, max_size=120)
sizes = st.integers(1, 17)


def padded_tokens(lengths, edges):
    return sum(min(edge for edge in edges if edge >= n) for n in lengths)


@given(lengths_of, st.integers(1, 6), st.sampled_from([1, 8, 16]))
def test_edges(lengths, max_shapes, multiple):
    edges = bucket_lengths(lengths, max_shapes, multiple)
    assert 1 <= len(edges) <= max_shapes
    assert list(edges) == sorted(set(edges))
    assert all(edge % multiple == 0 for edge in edges)
    assert max(lengths) <= edges[-1] < max(lengths) + multiple


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4))
def test_edges_are_optimal(lengths, max_shapes):
    longest = max(lengths)
    best = min(
        padded_tokens(lengths, (*chosen, longest))
        for k in range(max_shapes)
        for chosen in combinations(range(1, longest), k)
    )
    assert padded_tokens(lengths, bucket_lengths(lengths, max_shapes, 1)) == best


@given(lengths_of, sizes, st.integers(0, 9), st.integers(0, 9), st.integers(1, 9))
def test_an_epoch_has_each_example_once(lengths, batch_size, seed, epoch, window):
    batches = train_batches(lengths, batch_size, seed=seed, epoch=epoch, window=window)
    again = train_batches(lengths, batch_size, seed=seed, epoch=epoch, window=window)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) == (len(lengths) % batch_size > 0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_seed_and_epoch_change_the_order():
    lengths = np.arange(1, 101)
    orders = {
        tuple(np.concatenate(train_batches(lengths, 10, seed=seed, epoch=epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_the_same_for_ever():
    assert permutation(8, 0).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
    assert permutation(8, 3, 1, 0).tolist() == [6, 1, 4, 5, 2, 3, 0, 7]


def test_a_wider_window_wastes_less():
    lengths = np.random.default_rng(0).integers(4, 120, 1000)

    def waste(window):
        batches = train_batches(lengths, 16, seed=0, epoch=0, window=window)
        return sum(lengths[b].max() * len(b) for b in batches) / lengths.sum()

    assert waste(1) > 1.7
    assert waste(8) < 1.25
    assert waste(32) < waste(8)


@given(lengths_of, sizes)
def test_eval_batches_go_up(lengths, batch_size):
    order = np.concatenate(batches := eval_batches(lengths, batch_size))
    assert sorted(order) == list(range(len(lengths)))
    assert all(np.diff(np.asarray(lengths)[order]) >= 0)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 5))
def test_collate(lengths, fillers):
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    labels = np.linspace(1, 2, len(ids), dtype=np.float32)
    encoded = Encoded(ids, [x % 2 for x in ids], labels)
    edges, rows = (8, 16, 32), len(ids)
    batch = collate(encoded, range(rows)[::-1], rows + fillers, edges, pad_id=99)
    width = min(edge for edge in edges if edge >= max(lengths))
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].shape == (rows + fillers, width)
        assert batch[name].dtype == np.int32
    assert batch["weights"].tolist() == [1] * rows + [0] * fillers
    assert batch["weights"].dtype == batch["labels"].dtype == np.float32
    assert batch["labels"].tolist() == [*labels[::-1].tolist(), *[0] * fillers]
    assert batch["attention_mask"].sum(1).tolist() == lengths[::-1] + [1] * fillers
    real = batch["attention_mask"][:rows] == 1
    assert np.array_equal(batch["input_ids"][:rows][real], np.concatenate(ids[::-1]))
    assert (batch["input_ids"][:rows][~real] == 99).all()
    assert (batch["token_type_ids"][:rows] == batch["input_ids"][:rows] % 2)[real].all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bucket_lengths([]), "examples=0 must be at least 1"),
        (lambda: bucket_lengths([3], max_shapes=0), "max_shapes=0"),
        (lambda: train_batches([3], 0, seed=0, epoch=0), "batch_size=0"),
        (lambda: train_batches([3], 1, seed=0, epoch=0, window=0), "length_window=0"),
        (lambda: train_batches([3], 1, seed=-1, epoch=0), "seed=-1"),
        (lambda: eval_batches([3], 0), "eval_batch_size=0"),
        (lambda: collate(ENCODED, [0, 1], 1, (8,)), "2 examples do not fit"),
        (lambda: collate(ENCODED, [0, 1], 2, (4,)), "5 tokens is longer than the last edge 4"),
    ],
)
def test_faults(call, message):
    with pytest.raises(LoraxError, match=message):
        call()


ENCODED = Encoded([np.ones(5, np.int32)] * 2, [np.zeros(5, np.int32)] * 2, np.zeros(2, np.int32))
