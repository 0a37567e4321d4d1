"""Merging against an independent formula: loops over the kernel's entries, in float64."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from lorax import LoraSpec, init, merge, unmerge
from tests.helpers.lora import assert_bit_equal, assert_close, randomised

PROFILE = settings.get_profile("lora")


def by_hand(kernel, a, b, scale, axes):
    """kernel[index] + scale * sum_r B[o, r] A[r, i], one entry at a time."""
    kernel, a, b = (np.asarray(x, np.float64) for x in (kernel, a, b))
    out = kernel.copy()
    for index in np.ndindex(*kernel.shape):
        flat = {}
        for letter in "io":
            here = [n for n, axis in enumerate(axes) if axis == letter]
            flat[letter] = 0
            for n in here:
                flat[letter] = flat[letter] * kernel.shape[n] + index[n]
        layer = tuple(index[n] for n, axis in enumerate(axes) if axis == "b")
        out[index] += scale * (b[layer][flat["o"]] @ a[layer][:, flat["i"]])
    return out


@st.composite
def kernels(draw):
    """(axes, shape) of any kernel with an input, an output and perhaps stacked axes."""
    others = draw(st.lists(st.sampled_from("iob"), max_size=3))
    axes = "".join(draw(st.permutations(["i", "o", *others])))
    return axes, tuple(draw(st.integers(1, 4)) for _ in axes)


@PROFILE
@given(kernels(), st.integers(1, 3), st.floats(0.1, 4))
@example(("io", (4, 3)), 2, 2.0)
@example(("oi", (4, 3)), 2, 2.0)
@example(("ioo", (4, 2, 3)), 2, 2.0)
@example(("ooi", (2, 3, 4)), 2, 2.0)
@example(("iio", (2, 3, 4)), 2, 2.0)
@example(("iiio", (3, 3, 2, 4)), 2, 2.0)
@example(("bio", (3, 4, 2)), 2, 2.0)
@example(("iob", (4, 2, 3)), 2, 2.0)
@example(("bioo", (3, 4, 2, 2)), 2, 2.0)
def test_merge_is_the_formula_on_any_axes_and_unmerge_its_inverse(kernel, rank, alpha):
    axes, shape = kernel
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    rank = min(
        rank,
        *(
            int(np.prod([n for n, a in zip(shape, axes, strict=True) if a == letter]))
            for letter in "io"
        ),
    )
    spec = LoraSpec(rank, alpha, targets="w", kernel_axes={"w": axes})
    lora = randomised(jax.eval_shape(lambda: init(jax.random.key(0), base, spec)))
    merged = merge(base, lora, spec)
    expected = by_hand(base["w"], lora["w"]["a"], lora["w"]["b"], alpha / rank, axes)
    np.testing.assert_allclose(merged["w"], expected, atol=2e-5)
    assert_close(unmerge(merged, lora, spec), base)


def matrices(dtype=jnp.float32):
    w = jax.random.normal(jax.random.key(0), (8, 6)).astype(dtype)
    return {"query": {"kernel": w}, "other": {"kernel": w}}


SPEC = LoraSpec(2, alpha=3, targets="q")


def adapter(dtype=jnp.float32):
    lora = randomised(init(jax.random.key(0), matrices(), SPEC))
    return jax.tree.map(lambda x: x.astype(dtype), lora)


def test_other_leaves_are_returned_as_they_are():
    base = matrices()
    merged = merge(base, adapter(), SPEC)
    assert merged["other"]["kernel"] is base["other"]["kernel"]
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_a_bf16_kernel_keeps_its_dtype_and_is_rounded_once():
    base, lora = matrices(jnp.bfloat16), adapter()
    merged = merge(base, lora, SPEC)["query"]["kernel"]
    exact = by_hand(base["query"]["kernel"], *lora["query.kernel"].values(), 1.5, "io")
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


def test_a_bf16_adapter_does_not_round_an_fp32_base():
    lora = jax.tree.map(jnp.zeros_like, adapter(jnp.bfloat16))
    assert_bit_equal(merge(matrices(), lora, SPEC), matrices())


def test_a_fresh_adapter_merges_to_the_base_itself():
    base = matrices()
    assert_bit_equal(merge(base, init(jax.random.key(1), base, SPEC), SPEC), base)


def test_scales_by_path_and_a_spec_mean_the_same():
    lora = adapter()
    by_spec = merge(matrices(), lora, SPEC)
    assert_close(merge(matrices(), lora, {"query.kernel": 1.5}), by_spec)
    assert_close(merge(matrices(), lora, {"query.kernel": jnp.float32(1.5)}), by_spec)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_patterns_reach_the_merged_kernel(scaling):
    spec = LoraSpec(
        2, 3, scaling, "all-linear", rank_pattern={"other": 4}, alpha_pattern={"other": 5}
    )
    lora = randomised(init(jax.random.key(0), matrices(), spec))
    merged = merge(matrices(), lora, spec)
    for name, rank, alpha in (("query", 2, 3), ("other", 4, 5)):
        pair = lora[f"{name}.kernel"]
        assert pair["a"].shape == (rank, 8)
        scale = alpha / (rank if scaling == "lora" else rank**0.5)
        expected = by_hand(matrices()[name]["kernel"], *pair.values(), scale, "io")
        np.testing.assert_allclose(merged[name]["kernel"], expected, atol=1e-5)
