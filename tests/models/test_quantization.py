import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lorax.errors import LoraxError
from lorax.models import KINDS, dequantize, quantize
from lorax.models.layers.quantization import BLOCK, NF4, product


def kernel(inputs, outputs, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, (inputs, outputs)).astype(np.float32)


def test_the_sixteen_values_are_quantiles_of_a_normal():
    """As bitsandbytes makes them: 8 positive and 7 negative quantiles, and zero."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0], negative]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(inputs=st.integers(1, 200), outputs=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_weight_takes_the_nearest_value(inputs, outputs, seed):
    w = kernel(inputs, outputs, seed)
    w[:, 0] = 0
    got = np.asarray(dequantize(quantize(w, "nf4")))
    for start in range(0, inputs, BLOCK):
        block = w[start : start + BLOCK]
        values = np.abs(block).max(0)[None, :, None] * np.asarray(NF4, np.float32)
        errors = np.abs(block[..., None] - values).min(-1)
        np.testing.assert_allclose(
            np.abs(block - got[start : start + BLOCK]), errors, atol=1e-6 * np.abs(w).max()
        )
    got = np.asarray(dequantize(quantize(w, "int8")))
    step = np.abs(w).max(0) / 127
    assert (np.abs(w - got) <= 0.501 * step).all()


def test_bytes_are_those_of_the_papers():
    w = kernel(384, 1536)
    sizes = {kind: sum(x.nbytes for x in jax.tree.leaves(quantize(w, kind))) for kind in KINDS}
    assert sizes == {"int8": w.size + 4 * 1536, "nf4": w.size // 2 + 4 * w.size // BLOCK}
    assert [quantize(w, kind).shape for kind in KINDS] == [w.shape] * 2


def test_four_bits_of_a_normal_cost_a_tenth_and_eight_a_hundredth():
    w = kernel(512, 256)
    errors = {
        kind: np.linalg.norm(w - dequantize(quantize(w, kind))) / np.linalg.norm(w)
        for kind in KINDS
    }
    assert 0.005 < errors["int8"] < 0.01
    assert 0.08 < errors["nf4"] < 0.1


@pytest.mark.parametrize("shape, kind", [((4, 4), "int4"), ((4, 4), "INT8"), ((2, 4, 4), "nf4")])
def test_what_cannot_be_quantized_is_refused(shape, kind):
    with pytest.raises(LoraxError, match="only matrices are quantized, to int8 or nf4"):
        quantize(np.ones(shape), kind)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_kernel_it_stands_for(kind, dtype):
    w = jax.tree.map(jnp.asarray, quantize(kernel(100, 6), kind))
    x, grad = (jax.random.normal(jax.random.key(n), (2, 3, d)) for n, d in ((0, 100), (1, 6)))
    x = x.astype(dtype)
    y, back = jax.vjp(lambda x: product(jnp.float32, x, w), x)
    full = dequantize(w, dtype)
    want, plain_back = jax.vjp(lambda x: jnp.matmul(x, full, preferred_element_type=jnp.float32), x)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    (got,), (wanted,) = back(grad), plain_back(grad)
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * jnp.abs(wanted).max())


def test_lanes_share_one_kernel():
    w = jax.tree.map(jnp.asarray, quantize(kernel(64, 6), "nf4"))
    x = jax.random.normal(jax.random.key(0), (4, 3, 64))
    lanes = jax.jit(jax.vmap(functools.partial(product, jnp.float32), in_axes=(0, None)))
    np.testing.assert_allclose(lanes(x, w), x @ dequantize(w), rtol=1e-5)
    assert "tensor<4x64x6" not in lanes.lower(x, w).as_text()
