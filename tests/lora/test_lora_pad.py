"""A padded adapter is the unpadded one: in shape, in training, and back again."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import lorax
from tests.helpers.lora import assert_bit_equal, assert_close, fresh, quick_jit
from tests.helpers.nnx_zoo import CASES

pytestmark = pytest.mark.slow

PROFILE = settings.get_profile("lora")


def zeros(shape):
    return np.zeros(shape, np.float32)


@settings(PROFILE, max_examples=8)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    extra=st.integers(0, 4),
    stacked=st.sampled_from([(), (2,), (2, 3)]),
)
def test_unpad_undoes_pad_and_the_padding_is_zero(ranks, extra, stacked):
    rng = np.random.default_rng(0)
    lora = {
        f"t{i}": {
            "a": rng.normal(size=(*stacked, r, 3)).astype(np.float32),
            "b": rng.normal(size=(*stacked, 4, r)).astype(np.float32),
        }
        for i, r in enumerate(ranks)
    }
    width = max(ranks) + extra
    padded = lorax.pad(lora, width)
    for pair, rank in zip(padded.values(), ranks, strict=True):
        assert pair["a"].shape == (*stacked, width, 3)
        assert pair["b"].shape == (*stacked, 4, width)
        assert not pair["a"][..., rank:, :].any()
        assert not pair["b"][..., rank:].any()
    assert_bit_equal(lorax.unpad(padded, {f"t{i}": r for i, r in enumerate(ranks)}), lora)


def test_training_a_padded_adapter_is_training_the_unpadded_one():
    model, params, _, _ = CASES["sequential"].make()
    x = CASES["sequential"].inputs
    spec = lorax.LoraSpec(3, 6, targets="all-linear", rank_pattern={"layers.2": 1})
    lora = fresh(jax.eval_shape(lambda: lorax.init(jax.random.key(0), params, spec)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02, weight_decay=0.1))

    @quick_jit
    def train(lora):
        def loss(lora):
            return jnp.mean((lorax.adapt(model, lora, spec)(x) - 1) ** 2)

        def step(carry, _):
            lora, state = carry
            value, gradient = jax.value_and_grad(loss)(lora)
            updates, state = optimizer.update(gradient, state, lora)
            return (optax.apply_updates(lora, updates), state), value

        (lora, _), losses = jax.lax.scan(step, (lora, optimizer.init(lora)), length=20)
        return lora, losses

    plain, losses = train(lora)
    padded, padded_losses = train(lorax.pad(lora, 8))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, padded_losses, rtol=1e-5)
    ranks = {path: spec.rank_of(path) for path in lora}
    assert_close(lorax.unpad(padded, ranks), plain, tol=1e-6)
    assert_bit_equal(lorax.pad(lorax.unpad(padded, ranks), 8), padded)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (partial(lorax.pad, rank=2), r"cannot pad 'w' of rank 3 down to 2"),
        (partial(lorax.unpad, ranks={}), r"cannot cut 'w' of rank 3 to rank 0"),
        (partial(lorax.unpad, ranks={"w": 4}), r"cannot cut 'w' of rank 3 to rank 4; use 1 to 3"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(function, words):
    with pytest.raises(lorax.LoraxError, match=words):
        function({"w": {"a": zeros((3, 5)), "b": zeros((4, 3))}})
