import json

import jax
import numpy as np
import pytest

from lorax.runs.trial_id import trial_dir
from lorax.train import run_trial

pytestmark = pytest.mark.production

DROPOUT = {"model": {"dropout": 0.2}, "lora": {"rank": 2, "dropout": 0.2}}


def losses(config):
    run_trial(config)
    lines = (trial_dir(config) / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]


def test_evaluation_is_deterministic_with_dropout_on(bench):
    trial, without = bench(**DROPOUT), bench()
    batches = trial.batches()
    first = trial.predict(batches[0])
    np.testing.assert_array_equal(trial.predict(batches[0]), first)
    np.testing.assert_array_equal(without.predict(batches[0]), first)
    trained = jax.tree.map(np.array, trial.state.trainable)
    for batch in batches[:3]:  # draws dropout of three keys
        trial.step(batch)
    trial.state = trial.state._replace(trainable=trained, key=trial.state.key + 1)
    np.testing.assert_array_equal(trial.predict(batches[0]), first)


@pytest.mark.parametrize("part", [{"model": {"dropout": 0.3}}, {"lora": {"dropout": 0.3}}])
def test_dropout_follows_the_key_and_the_step(bench, part):
    trial = bench(**part)
    batch = trial.batches()[0]

    def loss(key, step):
        trial.state = trial.fresh()
        # B is zero at first, and an adapter's dropout without effect
        lora = jax.tree.map(lambda x: x + 0.5, trial.state.trainable["lora"])
        trainable = {**trial.state.trainable, "lora": lora}
        key = jax.random.key_data(jax.random.key(key))
        step = jax.numpy.int32(step)
        trial.state = trial.state._replace(trainable=trainable, key=key, step=step)
        return trial.step(batch)

    assert loss(1, 0) == loss(1, 0)
    assert len({loss(1, 0), loss(1, 1), loss(2, 0)}) == 3


@pytest.mark.parametrize("changes", [{}, DROPOUT], ids=["plain", "dropout"])
def test_the_seed_decides_the_losses_bit_for_bit(world, tmp_path, changes):
    train = {"max_steps": 6, "log_every": 1}
    first, again, other = (
        losses(world.trial(tmp_path / str(n), seed=seed, train=train, **changes))
        for n, seed in enumerate((5, 5, 6))
    )
    assert len(first) == 6
    assert first == again
    assert not set(first) & set(other)
