"""The compiled cost of a gradient: no more than hand-written LoRA, and well below the merge."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from tests.helpers.lora import with_params

D, DEPTH, BATCH, RANK = 256, 4, 64, 8
SPEC = lorax.LoraSpec(RANK, alpha=16, targets="all-linear")


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, use_bias=False, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


@pytest.fixture(scope="module")
def flops():
    model = nnx.eval_shape(lambda: Stack(nnx.Rngs(0)))
    base = nnx.to_pure_dict(nnx.state(model))
    lora = jax.eval_shape(lambda: lorax.init(jax.random.key(0), base, SPEC))
    x = jax.ShapeDtypeStruct((BATCH, D), jnp.float32)

    def adapted(lora, base, x):
        return lorax.adapt(with_params(model, base), lora, SPEC)(x)

    def merged(lora, base, x):
        return with_params(model, lorax.merge(base, lora, SPEC))(x)

    def by_hand(lora, base, x):
        for i in range(DEPTH):
            pair = lora[f"layers.{i}.kernel"]
            w = base["layers"][i]["kernel"]
            x = jax.nn.relu(x @ w + 2.0 * (x @ pair["a"].T) @ pair["b"].T)
        return x

    def cost(forward):
        gradient = jax.grad(lambda *args: jnp.sum(forward(*args) ** 2))
        return jax.jit(gradient).lower(lora, base, x).compile().cost_analysis()["flops"]

    return {f.__name__: cost(f) for f in (adapted, merged, by_hand)}


def test_adapt_costs_what_hand_written_lora_costs(flops):
    frozen = DEPTH * 2 * BATCH * D * D  # one product forward; backward all layers but the first
    assert flops["by_hand"] > 2 * frozen * (1 - 1 / DEPTH)
    assert flops["adapted"] <= 1.01 * flops["by_hand"]


def test_adapt_costs_well_below_merging_at_every_step(flops):
    assert flops["adapted"] < 0.8 * flops["merged"]
