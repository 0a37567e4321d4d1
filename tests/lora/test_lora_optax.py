"""Split before grad: what Optax then sees, and what it cannot touch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax import LoraSpec, combine, count_params, init, merge, split, trainable_mask
from tests.helpers.lora import assert_bit_equal, quick_jit, randomised

D = 8
KEYS = jax.random.split(jax.random.key(0), 3)
BASE = {
    "query": {"kernel": jax.random.normal(KEYS[0], (D, D))},
    "up": {"kernel": jax.random.normal(KEYS[1], (D, D)), "bias": jnp.ones(D)},
    "head": {"kernel": jax.random.normal(KEYS[2], (D, 2))},
}
SPEC = LoraSpec(2, targets="q", modules_to_save="head")
X = jax.random.normal(jax.random.key(5), (16, D))


def loss(params):
    w = merge(params["base"], params["lora"], SPEC)
    h = jnp.tanh(X @ w["query"]["kernel"]) @ w["up"]["kernel"] + w["up"]["bias"][None]
    return 100 * jnp.mean((h @ w["head"]["kernel"] - 1) ** 2)


@pytest.fixture
def parts():
    params = {"base": BASE, "lora": randomised(init(jax.random.key(1), BASE, SPEC))}
    return split(params, trainable_mask(params, SPEC))


def split_loss(trainable, frozen):
    return loss(combine(trainable, frozen))


def steps(optimizer, trainable, frozen, n):
    state = optimizer.init(trainable)

    @quick_jit
    def step(trainable, state):
        gradient = jax.grad(split_loss)(trainable, frozen)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(n):
        trainable, state = step(trainable, state)
    return trainable


def test_frozen_leaves_are_bit_equal_after_adam_with_decay_and_clipping(parts):
    trainable, frozen = parts
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    moved = steps(optimizer, trainable, frozen, 5)
    after = combine(moved, frozen)
    assert_bit_equal(after["base"]["up"], BASE["up"])
    assert_bit_equal(after["base"]["query"], BASE["query"])
    for old, new in zip(jax.tree.leaves(trainable), jax.tree.leaves(moved), strict=True):
        assert (old != new).all()


def test_the_optimizer_holds_two_moments_of_the_trainable_part_and_a_step_count(parts):
    trainable, frozen = parts
    state = optax.adam(0.1).init(trainable)
    here = 2 * (2 * D) + 2 * D
    assert count_params(trainable) == here
    assert count_params(state) == 2 * here + 1
    assert count_params(frozen) == 2 * D * D + D


def test_gradients_exist_for_the_trainable_part_only(parts):
    gradient = jax.grad(split_loss)(*parts)
    assert jax.tree.structure(gradient) == jax.tree.structure(parts[0])


def test_the_clip_norm_is_that_of_the_trainable_part(parts):
    trainable, frozen = parts
    full = jax.grad(loss)(combine(trainable, frozen))
    parts_of_norm = [*jax.tree.leaves(full["lora"]), full["base"]["head"]["kernel"]]
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in parts_of_norm))
    assert optax.global_norm(jax.grad(split_loss)(trainable, frozen)) == pytest.approx(norm, 1e-5)
    assert optax.global_norm(full) > 1.1 * norm
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    moved = steps(clipped, trainable, frozen, 1)
    step = jax.tree.map(jnp.subtract, moved, trainable)
    assert optax.global_norm(step) == pytest.approx(0.5, 1e-3)


def test_masking_the_optimizer_alone_would_move_the_frozen_weights(parts):
    """The fault that `split` is there for; if Optax mends it, this test says so."""
    params = combine(*parts)
    optimizer = optax.masked(optax.adam(0.1), trainable_mask(params, SPEC))
    updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    assert (updates["base"]["up"]["kernel"] != 0).any()
