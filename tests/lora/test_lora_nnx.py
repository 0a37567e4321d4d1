"""`adapt` on strangers' NNX models, against the same model with merged kernels."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from tests.helpers.lora import (
    assert_bit_equal,
    assert_close,
    fresh,
    merged_model,
    nnx_params,
    observe,
    randomised,
    with_params,
)
from tests.helpers.nnx_zoo import CASES

every_case = pytest.mark.parametrize("name", CASES)


@cache
def observed(name):
    case = CASES[name]
    model, params, spec, lora = case.make()
    return observe(
        lambda: with_params(model, params)(case.inputs),
        lambda lora: lorax.adapt(with_params(model, params), lora, spec)(case.inputs),
        lambda lora: merged_model(model, lora, spec)(case.inputs),
        lora,
    )


@every_case
def test_a_fresh_adapter_changes_nothing(name):
    assert_close(observed(name).fresh, observed(name).base, tol=1e-6)


@every_case
def test_the_output_is_that_of_the_merged_model(name):
    assert_close(observed(name).adapted, observed(name).merged)
    assert np.abs(observed(name).merged - observed(name).base).max() > 0.1


@every_case
def test_the_gradient_is_that_through_the_merge(name):
    assert_close(observed(name).gradient, observed(name).gradient_of_merge, tol=2e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(observed(name).gradient))


@pytest.mark.parametrize("name", ["sequential", "conv-1d", "tied-embedding"])
def test_without_jit_a_fresh_adapter_changes_no_bit_and_the_rest_holds(name):
    model, _, spec, lora = CASES[name].make()
    x = CASES[name].inputs
    assert_bit_equal(lorax.adapt(model, fresh(lora), spec)(x), model(x))
    assert_close(lorax.adapt(model, lora, spec)(x), observed(name).adapted)


@every_case
def test_the_model_is_left_alone_and_its_arrays_are_shared(name):
    model, params, spec, lora = CASES[name].make()
    graphdef = nnx.graphdef(model)
    adapted = lorax.adapt(model, lora, spec)
    assert nnx.graphdef(model) == graphdef
    assert_bit_equal(nnx_params(model), params)
    before = {id(leaf) for leaf in jax.tree.leaves(params)}
    after = {id(leaf) for leaf in jax.tree.leaves(nnx_params(adapted))}
    assert before <= after


@every_case
def test_a_filter_finds_exactly_the_adapter(name):
    model, params, spec, lora = CASES[name].make()
    adapted = lorax.adapt(model, lora, spec)
    found, rest = nnx.state(adapted, lorax.LoraParam, nnx.Param)
    ids = {id(leaf) for leaf in jax.tree.leaves(lora)}
    assert {id(leaf) for leaf in jax.tree.leaves(found)} == ids
    assert lorax.count_params(found) == lorax.count_lora_params(params, spec)
    assert lorax.count_params(rest) == lorax.count_params(params)
    assert lorax.count_params(nnx.state(adapted, nnx.Param)) == lorax.count_params((found, rest))


def test_an_adapted_model_trains_as_a_model_of_its_own():
    name = "sequential"
    model, _, spec, lora = CASES[name].make()
    adapted = lorax.adapt(model, lora, spec)
    graphdef, trainable, frozen = nnx.split(adapted, lorax.LoraParam, ...)

    @jax.jit
    def gradient(trainable):
        _, pullback = jax.vjp(
            lambda t: nnx.merge(graphdef, t, frozen)(CASES[name].inputs), trainable
        )
        return pullback(jnp.cos(observed(name).merged))[0]

    found = nnx.to_pure_dict(gradient(trainable))["layers"]
    for i in (0, 2):
        assert_close(found[i], observed(name).gradient[f"layers.{i}.kernel"])


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_patterns_reach_the_layers(scaling):
    model, params, _, _ = CASES["sequential"].make()
    spec = lorax.LoraSpec(
        1, 3, scaling, "all-linear", rank_pattern={"layers.2": 4}, alpha_pattern={"layers.0": 7}
    )
    lora = randomised(lorax.init(jax.random.key(0), params, spec))
    assert [pair["a"].shape[0] for pair in lora.values()] == [1, 4]
    x = CASES["sequential"].inputs
    assert_close(lorax.adapt(model, lora, spec)(x), merged_model(model, lora, spec)(x))


def test_half_precision_layers_stay_in_half_precision():
    model = nnx.Linear(8, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    spec = lorax.LoraSpec(2, targets="kernel")
    lora = randomised(lorax.init(jax.random.key(0), nnx_params(model), spec))
    x = jax.random.normal(jax.random.key(1), (4, 8))
    y = jax.jit(lorax.adapt(model, lora, spec))(x)
    assert y.dtype == jnp.bfloat16
    exact = merged_model(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), lora, spec)(x)
    assert_close(y, exact, tol=0.02)
