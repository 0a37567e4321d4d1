"""Layers that a model reaches by several paths are adapted on all of them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from tests.helpers.lora import assert_close, merged_model, nnx_params, quick_jit
from tests.helpers.nnx_zoo import Block, Case


class TwiceTheLayer(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


class TwiceTheBlock(nnx.Module):
    """ALBERT's style: one block at every depth."""

    def __init__(self, rngs):
        block = Block(rngs)
        self.blocks = nnx.List([block, block, Block(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Containers(nnx.Module):
    def __init__(self, rngs):
        self.by_name = nnx.Dict({"0": nnx.Linear(8, 8, rngs=rngs), "b": Block(rngs)})
        self.by_index = nnx.List([self.by_name["b"].up])
        self.plain = nnx.data({"last": nnx.Linear(16, 8, rngs=rngs)})

    def __call__(self, x):
        x = self.by_name["b"](self.by_name["0"](x))
        return self.plain["last"](self.by_index[0](x))


@pytest.mark.parametrize("build", [TwiceTheLayer, TwiceTheBlock, Containers])
def test_a_shared_layer_is_adapted_wherever_it_is_called(build):
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    model, _, spec, lora = Case(build, x, "all-linear").make()
    adapted, merged = quick_jit(
        lambda lora: (lorax.adapt(model, lora, spec)(x), merged_model(model, lora, spec)(x))
    )(lora)
    assert_close(adapted, merged)


class OneArrayInTwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(self.first(x))


def test_one_array_in_different_layers_is_refused():
    model = OneArrayInTwoLayers(nnx.Rngs(0))
    spec = lorax.LoraSpec(2, targets="first")
    lora = lorax.init(jax.random.key(0), nnx_params(model), spec)
    with pytest.raises(lorax.LoraxError, match=r"first\.kernel.*second\.kernel.*lorax\.merge"):
        lorax.adapt(model, lora, spec)(jnp.ones((1, 8)))
