"""Batches by number are those of `collate`, in the order of `train_batches`."""

import dataclasses

import jax
import numpy as np
import pytest

from lorax import data
from lorax.train.batch_stream import BLOCK, BatchStream
from lorax.train.dataset import load_dataset
from lorax.train.indexed_batch import expand


def alone(batch, run):
    return dataclasses.replace(batch, examples=batch.examples[run], starts=batch.starts[run])


@pytest.mark.parametrize(
    ("task", "train"),
    [
        ("sst2", {"batch_size": 16, "max_shapes": 3}),
        ("sst2", {"batch_size": 12, "grad_accum": 3, "max_shapes": 2}),
        ("stsb", {"batch_size": 7, "max_shapes": 4}),
    ],
)
def test_each_run_gets_the_batches_of_its_seed_in_rows(world, task, train):
    trial = world.trial(task={"name": task, "max_length": 24}, train=train)
    dataset, seeds = load_dataset(trial), [3, 0, 3]
    per_epoch = -(-len(dataset.train) // trial.train.batch_size)
    stream = BatchStream(dataset, trial.train, seeds)
    in_rows = jax.jit(expand)
    for step in (0, 1, per_epoch - 1, per_epoch, 2 * per_epoch + 1):  # the last one is partial
        batch = stream.at(step)
        epoch, n = divmod(step, per_epoch)
        order = {
            seed: data.train_batches(
                len(dataset.train), trial.train.batch_size, seed=seed, epoch=epoch
            )[n]
            for seed in seeds
        }
        wanted = data.collate_alike(
            dataset.train,
            [order[seed] for seed in seeds],
            dataset.layout,
            parts=trial.train.grad_accum,
            pad_id=dataset.pad_id,
        )
        for run, want in enumerate(wanted):
            found = in_rows(alone(batch, run))
            assert found.keys() == want.keys()
            for name, value in want.items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)
                assert found[name].dtype == value.dtype
        assert batch.shape.tokens == wanted[0]["input_ids"].size


def test_a_step_has_one_batch_wherever_the_stream_starts(world):
    trial = world.trial(train={"batch_size": 2})
    dataset = load_dataset(trial)
    through = BatchStream(dataset, trial.train, [1, 2])
    for step in range(BLOCK + 3):
        batch = through.at(step)
        if step in (1, BLOCK - 1, BLOCK, BLOCK + 2):
            again = BatchStream(dataset, trial.train, [1, 2]).at(step)
            np.testing.assert_array_equal(batch.examples, again.examples)
            np.testing.assert_array_equal(batch.starts, again.starts)
            assert batch.shape == again.shape
