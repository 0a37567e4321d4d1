"""`linen_apply` on strangers' Linen models, against `apply` with merged kernels."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lorax
from tests.helpers.linen_zoo import CASES
from tests.helpers.lora import assert_bit_equal, assert_close, fresh, observe

pytestmark = pytest.mark.slow

every_case = pytest.mark.parametrize("name", CASES)


@cache
def observed(name):
    module, x, variables, spec, lora = CASES[name].make()

    def merged(lora):
        return module.apply({"params": lorax.merge(variables["params"], lora, spec)}, x)

    return observe(
        lambda: module.apply(variables, x),
        lambda lora: lorax.linen_apply(module, variables, lora, spec, x),
        merged,
        lora,
    )


@every_case
def test_a_fresh_adapter_changes_nothing(name):
    assert_close(observed(name).fresh, observed(name).base, tol=1e-6)


@every_case
def test_the_output_is_that_of_merged_kernels(name):
    assert_close(observed(name).adapted, observed(name).merged)
    assert np.abs(observed(name).merged - observed(name).base).max() > 0.1


@every_case
def test_the_gradient_is_that_through_the_merge(name):
    assert_close(observed(name).gradient, observed(name).gradient_of_merge, tol=2e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(observed(name).gradient))


def test_without_jit_a_fresh_adapter_changes_no_bit():
    module, x, variables, spec, lora = CASES["conv"].make()
    y = lorax.linen_apply(module, variables, fresh(lora), spec, x)
    assert_bit_equal(y, module.apply(variables, x))


def test_mutable_collections_and_methods_pass_through():
    class Normed(nn.Module):
        @nn.compact
        def encode(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="query")(x))

    module, x = Normed(), jnp.arange(12.0).reshape(3, 4)
    variables = module.init(jax.random.key(0), x, True, method="encode")
    spec = lorax.LoraSpec(2, targets="query")
    lora = lorax.init(jax.random.key(1), variables["params"], spec)
    options = {"train": True, "mutable": ["batch_stats"], "method": "encode"}
    assert_bit_equal(
        lorax.linen_apply(module, variables, lora, spec, x, **options),
        module.apply(variables, x, **options),
    )


@pytest.mark.parametrize(
    ("module", "axes", "words"),
    [
        (nn.Conv(4, (3,), feature_group_count=2, name="w"), "iio", "is a Conv"),
        (nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)), name="w"), "iio", "is a Conv"),
        (nn.ConvTranspose(4, (3,), name="w"), "iio", "is a ConvTranspose"),
        (nn.DenseGeneral(4, batch_dims=0, axis=-1, name="w"), "bio", "is a DenseGeneral"),
    ],
)
def test_a_layer_without_a_low_rank_path_is_refused(module, axes, words):
    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return module.clone(parent=self)(x)

    x = jnp.ones((2, 6, 4))
    variables = Holder().init(jax.random.key(0), x)
    spec = lorax.LoraSpec(1, targets="w", kernel_axes={"w": axes})
    lora = lorax.init(jax.random.key(1), variables["params"], spec)
    with pytest.raises(lorax.LoraxError, match=rf"'w' {words}.*lorax\.merge"):
        lorax.linen_apply(Holder(), variables, lora, spec, x)


def test_a_target_that_is_never_called_is_refused():
    module, x, variables, spec, lora = CASES["bare dense"].make()
    other = {"elsewhere.kernel": lora["kernel"]}
    with pytest.raises(lorax.LoraxError, match=r"'elsewhere\.kernel' was never called"):
        lorax.linen_apply(module, variables, other, spec, x)


def test_an_adapter_of_another_width_is_refused():
    module, x, variables, spec, lora = CASES["bare dense"].make()
    wrong = {"kernel": {"a": jnp.ones((2, 5)), "b": lora["kernel"]["b"]}}
    with pytest.raises(lorax.LoraxError, match="adapter of 'kernel' has A"):
        lorax.linen_apply(module, variables, wrong, spec, x)


def test_scanned_layers_are_refused():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return layer(x), None

            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(nn.Dense(4, name="layers"), x, None)[0]

    x = jnp.ones((2, 4))
    variables = Stack().init(jax.random.key(0), x)
    assert variables["params"]["layers"]["kernel"].shape == (3, 4, 4)
    spec = lorax.LoraSpec(1, targets="layers", kernel_axes={"layers": "bio"})
    lora = lorax.init(jax.random.key(1), variables["params"], spec)
    with pytest.raises(lorax.LoraxError, match=r"adapter of 'layers\.kernel' has A \(3, 1, 4\)"):
        lorax.linen_apply(Stack(), variables, lora, spec, x)
