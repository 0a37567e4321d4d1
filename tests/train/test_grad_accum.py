import jax
import numpy as np
import pytest

from lorax.train.step import example_losses, forward

UNIT_ROUNDOFF = 2.0**-24  # of float32


def moments(trial):
    """The clipped gradient of a first step, as Adam's first moment holds it."""
    return jax.tree.leaves(trial.state.opt_state[1].mu)


def largest_terms(trial, batch):
    """The largest mean over examples of the gradient's absolute terms.

    Sums round in proportion to their terms, however much of these cancels.
    """
    real = np.flatnonzero(batch["weights"])
    total = [np.zeros(leaf.shape) for leaf in moments(trial)]
    for n in real:
        trial.state = trial.fresh()
        trial.step({**batch, "weights": np.eye(len(batch["weights"]), dtype=np.float32)[n]})
        total = [sum_ + np.abs(leaf) for sum_, leaf in zip(total, moments(trial), strict=True)]
    return max(leaf.max() for leaf in total) / len(real)


def test_four_micro_batches_are_one_batch(bench):
    off = {"clip_norm": None}
    whole, parts = bench(optimizer=off), bench(optimizer=off, train={"grad_accum": 4})
    batches = whole.batches()
    assert min(batch["weights"].sum() for batch in batches) == 6  # of 16: 150 examples
    for batch, in_parts in zip(batches, parts.batches(), strict=True):
        whole.state, parts.state = whole.fresh(), parts.fresh()
        assert parts.step(in_parts) == pytest.approx(whole.step(batch), rel=1e-6)
        found = list(zip(moments(whole), moments(parts), strict=True))
        roundings = 4 * UNIT_ROUNDOFF * largest_terms(whole, batch)  # twice what is seen
        for expected, got in found:
            np.testing.assert_allclose(got, expected, rtol=0, atol=roundings)


def test_the_gradient_is_that_of_the_mean_over_real_examples(bench):
    trial = bench(optimizer={"clip_norm": None})
    partial = next(batch for batch in trial.batches() if batch["weights"].sum() == 6)
    program, frozen = trial.setup.program, trial.setup.frozen

    def loss(trainable):
        outputs = forward(program, trainable, frozen, partial)[:6]
        return example_losses("classification", outputs, partial["labels"][:6])[0].mean()

    expected = jax.tree.leaves(jax.jit(jax.grad(loss))(trial.state.trainable))
    trial.step(partial)
    largest = max(np.abs(leaf).max() for leaf in expected)
    for want, got in zip(expected, moments(trial), strict=True):
        np.testing.assert_allclose(got / 0.1, want, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_loss_is_the_mean_over_real_examples(bench, grad_accum):
    whole, trial = bench(), bench(train={"grad_accum": grad_accum})
    partial, own = (
        next(batch for batch in t.batches() if batch["weights"].sum() < 16) for t in (whole, trial)
    )
    outputs = whole.predict(partial)[:6]
    expected = np.mean(example_losses("classification", outputs, partial["labels"][:6])[0])
    assert trial.step(own) == pytest.approx(float(expected), rel=1e-6)


def test_padding_and_absent_examples_have_no_gradient(bench):
    trial = bench()
    partial = next(batch for batch in trial.batches() if batch["weights"].sum() < 16)
    trial.step(partial)
    expected = moments(trial)
    trial.state = trial.fresh()
    other = {name: np.array(values) for name, values in partial.items()}
    other["labels"][6:] = 1
    other["input_ids"][other["segment_ids"] == 0] = 9
    assert (other["input_ids"] != partial["input_ids"]).sum() > 20
    trial.step(other)
    for want, got in zip(expected, moments(trial), strict=True):
        np.testing.assert_array_equal(got, want)
