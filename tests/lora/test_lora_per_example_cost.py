"""The compiled cost of rows with adapters of their own: one adapter's, however many there are."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from tests.helpers.lora import with_params

D, BATCH, TOKENS, RANK = 256, 8, 32, 16
SPEC = lorax.LoraSpec(RANK, targets="all-linear")


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(2)])

    def __call__(self, x_BxTxD):
        for layer in self.layers:
            x_BxTxD = nnx.relu(layer(x_BxTxD))
        return x_BxTxD


@pytest.fixture(scope="module")
def costs():
    """FLOPs and temporary bytes of one adapter, and of stacks of so many."""
    model = nnx.eval_shape(lambda: Stack(nnx.Rngs(0)))
    base = nnx.to_pure_dict(nnx.state(model))
    lora = jax.eval_shape(lambda: lorax.init(jax.random.key(0), base, SPEC))
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, D), jnp.float32)
    rows = jax.ShapeDtypeStruct((BATCH,), jnp.int32)

    def cost(function, *shapes):
        compiled = jax.jit(function).lower(*shapes).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return compiled.cost_analysis()["flops"], temporary

    def alone(base, lora, x):
        return lorax.adapt(with_params(model, base), lora, SPEC)(x)

    def by_row(base, pool, rows, x):
        return lorax.adapt_rows(with_params(model, base), pool, rows)(x)

    def pool(count):
        empty = jax.eval_shape(lambda: lorax.stack_adapters([({}, {})], like=lora))
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape[1:]), s.dtype), empty)

    found = {count: cost(by_row, base, pool(count), rows, x) for count in (2, 64)}
    return found | {"alone": cost(alone, base, lora, x)}


def test_the_products_are_those_of_one_adapter(costs):
    gathered = 2 * BATCH * RANK * 2 * D  # numbers, of both layers
    assert costs[2][0] <= 1.01 * costs["alone"][0] + 4 * gathered


def test_more_adapters_cost_no_more(costs):
    assert costs[64][0] <= costs[2][0] + 64
    assert costs[64][1] <= costs[2][1] + 1024


def test_the_memory_is_that_of_the_gathered_factors(costs):
    gathered = 4 * BATCH * RANK * 2 * D  # bytes, of a layer
    assert costs[64][1] <= costs["alone"][1] + 2 * 2 * gathered
