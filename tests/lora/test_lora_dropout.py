"""Dropout on the input of A: off without a key, unbiased with one, its own for each target."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.helpers.linen_zoo import CASES as LINEN_CASES
from tests.helpers.lora import assert_bit_equal, assert_close, quick_jit
from tests.helpers.nnx_zoo import CASES as NNX_CASES

RATE = 0.3


@cache
def ways():
    """name -> (run(lora, spec, dropout, key), spec, adapter); each model is linear."""
    found = {}
    for name in ("bare-linear", "conv-1d"):
        model, _, spec, lora = NNX_CASES[name].make()
        x = NNX_CASES[name].inputs
        found[name] = (
            lambda lora, spec, model=model, x=x, **o: lorax.adapt(model, lora, spec, **o)(x),
            spec,
            {"kernel": lora["kernel"]} if name == "bare-linear" else {**lora},
        )
    module, x, variables, spec, lora = LINEN_CASES["bare conv"].make()
    found["linen conv"] = (
        lambda lora, spec, **o: lorax.linen_apply(module, variables, lora, spec, x, **o),
        spec,
        lora,
    )
    return found


every_way = pytest.mark.parametrize("way", ["bare-linear", "conv-1d", "linen conv"])


@every_way
def test_without_a_key_the_rate_does_not_matter(way):
    run, spec, lora = ways()[way]
    assert_bit_equal(run(lora, spec, dropout=0.9), run(lora, spec))
    assert_bit_equal(run(lora, spec, dropout=0.0, key=jax.random.key(0)), run(lora, spec))


@every_way
def test_the_mean_over_keys_is_the_output_without_dropout(way):
    run, spec, lora = ways()[way]
    n = 1000

    def sample(key):
        return run(lora, spec, dropout=RATE, key=key)

    samples = quick_jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), n))
    spread = np.std(samples, axis=0)
    assert spread.max() > 0.1
    error = np.abs(np.mean(samples, axis=0) - run(lora, spec))
    assert (error < 5 * spread / n**0.5 + 1e-4).all()


def test_the_share_of_dropped_inputs_is_the_rate():
    run, spec, _ = ways()["bare-linear"]
    one_input = {"kernel": {"a": jnp.eye(2, 4), "b": jnp.eye(5, 2)}}

    def change(key):
        dropped = run(one_input, spec, dropout=RATE, key=key)
        return (dropped - run(one_input, {"kernel": 0.0}))[:, :2]

    changes = quick_jit(jax.vmap(change))(jax.random.split(jax.random.key(0), 2000))
    assert np.mean(np.abs(changes) < 1e-6) == pytest.approx(RATE, abs=0.02)
    kept = 1.5 * NNX_CASES["bare-linear"].inputs[None, :, :2] / (1 - RATE)
    is_kept_or_dropped = np.isclose(changes, kept, atol=1e-4) | (np.abs(changes) < 1e-6)
    assert is_kept_or_dropped.all()


def test_a_key_fixes_the_draw():
    run, spec, lora = ways()["bare-linear"]
    first, again, other = (run(lora, spec, dropout=RATE, key=jax.random.key(i)) for i in (0, 0, 1))
    assert_bit_equal(first, again)
    assert not np.allclose(first, other)


def test_each_target_drops_its_own_inputs():
    from lorax.lora.low_rank import Branch, drop

    x, key = jnp.ones((50, 8)), jax.random.key(0)
    masks = [drop(x, Branch(p, x, x, 1.0, 0.5, key)) > 0 for p in ("query.kernel", "key.kernel")]
    assert 0.3 < np.mean(masks[0] == masks[1]) < 0.7


def test_the_rate_is_the_spec_s_unless_given():
    run, spec, lora = ways()["bare-linear"]
    with_rate = lorax.LoraSpec(2, alpha=3, targets="kernel", dropout=RATE)
    key = jax.random.key(0)
    assert_bit_equal(run(lora, with_rate, key=key), run(lora, spec, dropout=RATE, key=key))
    assert_close(run(lora, with_rate, dropout=0.0, key=key), run(lora, spec))


@every_way
def test_a_key_without_a_rate_is_refused(way):
    run, _, lora = ways()[way]
    with pytest.raises(lorax.LoraxError, match="pass dropout="):
        run(lora, dict.fromkeys(lora, 1.0), key=jax.random.key(0))


@pytest.mark.parametrize("rate", [1.0, -0.1, 7.0])
def test_a_rate_out_of_range_is_refused(rate):
    run, spec, lora = ways()["bare-linear"]
    with pytest.raises(lorax.LoraxError, match=r"dropout=.* is not in \[0, 1\)"):
        run(lora, spec, dropout=rate, key=jax.random.key(0))
