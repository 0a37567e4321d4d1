import jax
import jax.numpy as jnp
import numpy as np

from lorax.train.step import train_step

BF16 = {"precision": "bf16", "base_dtype": "bf16"}


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def test_the_base_is_stored_in_bf16_and_what_is_trained_in_fp32(bench):
    trial = bench(train=BF16)
    for batch in trial.batches():
        assert np.isfinite(trial.step(batch))
    assert dtypes(trial.setup.frozen.params) == {jnp.dtype(jnp.bfloat16)}
    assert dtypes(trial.state.trainable) == {jnp.dtype(jnp.float32)}
    assert dtypes(trial.state.opt_state[1].nu) == {jnp.dtype(jnp.float32)}


def test_compute_is_bf16_and_close_to_fp32(bench):
    exact, half = bench(), bench(train={"precision": "bf16"})
    assert dtypes(half.setup.frozen.params) == {jnp.dtype(jnp.float32)}
    batch = exact.batches()[0]
    difference = np.abs(half.predict(batch) - exact.predict(batch)).max()
    assert 0 < difference < 0.05
    parts = half.setup.program, half.state, half.setup.frozen, half.hyper, batch
    rows, length = batch["input_ids"].shape
    assert f"tensor<{rows}x{length}x32xbf16>" in train_step.lower(*parts).as_text()
