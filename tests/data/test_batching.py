import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.data import Encoded, collate, eval_plan, pad, permutation, train_batches
from lorax.errors import LoraxError

lengths_of = st.lists(st.integers(1, 30), min_size=1, max_size=80)


def encoded_of(lengths):
    ids = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    return Encoded(ids, [x % 2 for x in ids], np.linspace(1, 2, len(ids), dtype=np.float32))


@given(st.integers(1, 120), st.integers(1, 17), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_has_each_example_once(count, batch_size, seed, epoch):
    batches = train_batches(count, batch_size, seed=seed, epoch=epoch)
    again = train_batches(count, batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(np.concatenate(train_batches(100, 10, seed=seed, epoch=epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_the_same_for_ever():
    assert permutation(8, 0).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
    assert permutation(8, 3, 1, 0).tolist() == [6, 1, 4, 5, 2, 3, 0, 7]


@given(lengths_of, st.integers(1, 17), st.sampled_from([1, 4]))
def test_an_evaluation_has_each_example_once_in_batches_of_one_shape(lengths, size, multiple):
    encoded = encoded_of(lengths)
    layout, batches = eval_plan(encoded, size, 32, multiple)
    indices = np.concatenate([indices for indices, _ in batches])
    assert sorted(indices) == list(range(len(lengths)))
    assert layout.examples % multiple == layout.rows[0] % multiple == 0
    for own, placed in batches:
        batch = collate(encoded, own, placed, layout, rows=layout.rows[0])
        assert batch["input_ids"].shape == (layout.rows[0], 32)
        assert batch["labels"][: len(own)].tolist() == encoded.labels[own].tolist()
        assert (batch["segment_ids"] > 0).sum() == sum(lengths[i] for i in own)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.sampled_from([None, 32]))
def test_pad(lengths, length):
    encoded = encoded_of(lengths)
    order = np.arange(len(lengths))[::-1]
    batch = pad(encoded, order, pad_id=99, length=length)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].shape == (len(lengths), length or max(lengths))
        assert batch[name].dtype == np.int32
    assert batch["attention_mask"].sum(1).tolist() == lengths[::-1]
    real = batch["attention_mask"] == 1
    assert np.array_equal(batch["input_ids"][real], np.concatenate(encoded.input_ids[::-1]))
    assert (batch["input_ids"][~real] == 99).all()
    assert (batch["token_type_ids"] == batch["input_ids"] % 2)[real].all()
    assert batch["labels"].tolist() == encoded.labels[::-1].tolist()
    assert batch["weights"].tolist() == [1] * len(lengths)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_batches(1, 0, seed=0, epoch=0), "batch_size=0"),
        (lambda: train_batches(1, 1, seed=-1, epoch=0), "seed=-1"),
        (lambda: eval_plan(encoded_of([3]), 0, 8), "eval_batch_size=0"),
        (lambda: eval_plan(encoded_of([9]), 1, 8), "9 tokens is longer than a row of 8"),
    ],
)
def test_faults(call, message):
    with pytest.raises(LoraxError, match=message):
        call()
