"""What `adapt` cannot factor, it refuses, by name and with a way out."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from tests.helpers.lora import nnx_params

RNGS = nnx.Rngs(0)
LAYERS = {
    "grouped conv": (nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=RNGS), "iiio"),
    "masked conv": (nnx.Conv(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=RNGS), "iio"),
    "transposed conv": (nnx.ConvTranspose(4, 4, (3, 3), rngs=RNGS), "iiio"),
    "batched": (nnx.LinearGeneral(4, 4, axis=-1, batch_axis={0: 3}, rngs=RNGS), "bio"),
    "diagonal einsum": (nnx.Einsum("bi,ij->b", (4, 4), rngs=RNGS), "io"),
    "ellipsis in kernel": (nnx.Einsum("b...i,i...->b...", (4, 4), rngs=RNGS), "io"),
}


class Holder(nnx.Module):
    def __init__(self, layer):
        self.layer = layer
        self.query = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_a_low_rank_path(name):
    layer, axes = LAYERS[name]
    model = Holder(layer)
    spec = lorax.LoraSpec(1, targets="layer", kernel_axes={"layer": axes})
    lora = lorax.init(jax.random.key(0), nnx_params(model), spec)
    with pytest.raises(lorax.LoraxError, match=r"'layer(\.kernel)?'"):
        lorax.adapt(model, lora, spec)


@pytest.mark.parametrize("name", LAYERS)
def test_such_a_layer_does_not_hinder_the_others(name):
    model = Holder(LAYERS[name][0])
    assert lorax.kernel_axes(model) == {}
    spec = lorax.LoraSpec(1, targets="query")
    lora = lorax.init(jax.random.key(0), nnx_params(model), spec)
    assert lorax.adapt(model, lora, spec).query(jnp.ones((1, 4))).shape == (1, 4)


class OwnParameter(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((4, 4)))


def test_a_parameter_of_a_module_of_the_user_s_own():
    model = Holder(OwnParameter())
    spec = lorax.LoraSpec(1, targets="layer")
    lora = lorax.init(jax.random.key(0), nnx_params(model), spec)
    with pytest.raises(lorax.LoraxError, match=r"is a OwnParameter.*lorax\.merge"):
        lorax.adapt(model, lora, spec)


def test_a_target_that_is_not_in_the_model():
    spec = lorax.LoraSpec(1, targets="query")
    lora = lorax.init(jax.random.key(0), nnx_params(Holder(None)), spec)
    for model in (nnx.Linear(4, 4, rngs=RNGS), nnx.List([nnx.Linear(4, 4, rngs=RNGS)])):
        with pytest.raises(lorax.LoraxError, match=r"'query\.kernel' is not in the model"):
            lorax.adapt(model, lora, spec)


def test_an_adapter_of_another_width():
    model = Holder(None)
    wrong = {"query.kernel": {"a": jnp.ones((1, 5)), "b": jnp.ones((4, 1))}}
    with pytest.raises(lorax.LoraxError, match=r"adapter of 'query\.kernel' has A \(1, 5\)"):
        lorax.adapt(model, wrong, lorax.LoraSpec(1, targets="query"))


def test_layers_stacked_by_a_transform():
    @nnx.vmap(in_axes=0)
    def layers(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    model = Holder(layers(jax.random.split(jax.random.key(0), 3)))
    spec = lorax.LoraSpec(1, targets="layer", kernel_axes={"layer": "bio"})
    lora = lorax.init(jax.random.key(0), nnx_params(model), spec)
    with pytest.raises(lorax.LoraxError, match=r"'layer\.kernel'.*nnx\.vmap.*lorax\.merge"):
        lorax.adapt(model, lora, spec)


def test_an_einsum_given_at_the_call():
    model = nnx.Einsum("bi,io->bo", (4, 4), rngs=RNGS)
    spec = lorax.LoraSpec(1, targets="kernel")
    adapted = lorax.adapt(model, lorax.init(jax.random.key(0), nnx_params(model), spec), spec)
    with pytest.raises(lorax.LoraxError, match="give the einsum to the layer"):
        adapted(jnp.ones((2, 4)), "bi,oi->bo")


@pytest.mark.parametrize(
    ("layer", "leaf", "right"),
    [
        (nnx.Linear(4, 4, rngs=RNGS), "bias", "kernel"),
        (nnx.Linear(4, 4, rngs=RNGS), "embedding", "kernel"),
        (nnx.Embed(4, 4, rngs=RNGS), "kernel", "embedding"),
    ],
)
def test_a_target_that_is_another_leaf_of_the_layer(layer, leaf, right):
    lora = {f"layer.{leaf}": {"a": jnp.ones((1, 4)), "b": jnp.ones((4, 1))}}
    with pytest.raises(lorax.LoraxError, match=rf"'layer\.{leaf}' is not its layer's '{right}'"):
        lorax.adapt(Holder(layer), lora, lorax.LoraSpec(1))
