import jax
import numpy as np
import pytest

from lorax.lora import count_bytes
from lorax.lora.paths import leaves_by_path
from lorax.models import load_model


def checkpoint_leaves(config):
    from flax import nnx

    model = load_model(config.model, 2, key=jax.random.key(0))
    tree = leaves_by_path(nnx.to_pure_dict(nnx.state(model)))
    return {f"base.{path}": leaf for path, leaf in tree.items() if path.startswith("encoder")}


def changed(before, after):
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_at_init_the_adapted_model_is_the_base(bench):
    adapted, plain = bench(), bench(train={"mode": "head"})
    batch = adapted.batches()[0]
    outputs = adapted.predict(batch)
    np.testing.assert_array_equal(outputs, plain.predict(batch))
    assert np.ptp(outputs) > 0
    adapted.step(batch)
    assert not np.array_equal(adapted.predict(batch), outputs)


@pytest.mark.parametrize("mode", ["lora", "head"])
def test_training_leaves_the_base_as_the_checkpoint_has_it(bench, mode):
    trial = bench(train={"mode": mode})
    before = trial.leaves()
    for batch in trial.batches():
        trial.step(batch)
    after, checkpoint = trial.leaves(), checkpoint_leaves(trial.config)
    for path, weight in checkpoint.items():
        np.testing.assert_array_equal(after[path], weight, err_msg=path)
    trained = {path for path in before if path.startswith(("base.head", "lora."))}
    assert changed(before, after) == trained
    assert len(before) == len(checkpoint) + len(trained)


def test_full_fine_tuning_moves_every_leaf(bench):
    trial = bench(train={"mode": "full"})
    before = trial.leaves()
    for batch in trial.batches():
        trial.step(batch)
    assert changed(before, trial.leaves()) == set(before)


@pytest.mark.parametrize("mode", ["lora", "head", "full"])
def test_optimizer_state_is_two_moments_of_the_trained_part_and_a_count(bench, mode):
    trial = bench(train={"mode": mode})
    trained = count_bytes(trial.setup.trainable)
    assert trained == 4 * trial.setup.counts["trainable_params"]
    assert count_bytes(trial.state.opt_state) == 2 * trained + 4
