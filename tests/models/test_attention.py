"""The hand-written gradients equal those of JAX for the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.lora.dropout import keep_mask
from lorax.models.layers.attention import attend
from lorax.models.layers.dense import product

pytestmark = pytest.mark.slow

RATE = 0.3


def plain(q, k, v, mask, keep=None):
    """Attention as a formula, one step after another, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / jnp.sqrt(jnp.float32(q.shape[-1]))
    logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits)
    if keep is not None:
        weights = jnp.where(keep, weights / (1 - RATE), 0)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def draw(seed, shape, *, tokens=None, dtype=jnp.float32):
    batch, length, heads, width = shape
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = (length, tokens or length, tokens or length, length)
    arrays = [
        2 * jax.random.normal(key, (batch, n, heads, width), dtype)
        for key, n in zip(keys[:4], sizes, strict=True)
    ]
    mask = jax.random.bernoulli(keys[4], 0.6, (batch, length, tokens or length))
    return arrays[:3], arrays[3], mask


def both(function, reference, inputs, grad):
    @functools.partial(jax.jit, static_argnums=0)
    def pull(f, *inputs):
        out, back = jax.vjp(f, *inputs)
        return out, *back(grad)

    return pull(function, *inputs), pull(reference, *inputs)


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 6),
)
def test_outputs_and_gradients_are_those_of_the_formula(seed, batch, length, tokens, heads, width):
    inputs, grad, mask = draw(seed, (batch, length, heads, width), tokens=tokens)
    mask = mask.at[..., 0].set(True)  # with nothing to attend to, the formula has no limit
    out, back = jax.jit(lambda *x: jax.vjp(lambda *y: attend(*y, mask), *x))(*inputs)
    wanted, sizes = exact(*inputs, mask, grad)
    for got, want, size in zip((out, *jax.jit(back)(grad)), wanted, sizes, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-7 * max(1, size))


def exact(q, k, v, mask, grad):
    """Outputs and gradients in float64, and of each the size of the terms that cancel in it."""
    q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    logits = np.where(np.asarray(mask)[:, None], np.einsum("bthk,bshk->bhts", q, k) * scale, -1e300)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("bthk,bshk->bhts", grad, v)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    found = (
        np.einsum("bhts,bshk->bthk", weights, v),
        np.einsum("bhts,bshk->bthk", dlogits, k),
        np.einsum("bhts,bthk->bshk", dlogits, q),
        np.einsum("bhts,bthk->bshk", weights, grad),
    )
    v_size, k_size, q_size, grad_size = (np.abs(x).max() for x in (v, k, q, grad))
    steep, queries = np.abs(dweights).max() * scale, q.shape[1]
    sizes = np.array([v_size, steep * k_size, queries * steep * q_size, queries * grad_size])
    spread = np.abs(logits[logits > -1e300]).max()  # an exponential has the error of its logit
    return found, sizes * max(1, spread)


def test_dropout_of_the_weights_has_the_formulas_gradient():
    inputs, grad, _ = draw(3, (2, 7, 3, 4))
    mask = jnp.ones((2, 7, 7), bool)

    def dropped(*x):
        return attend(*x, mask, dropout_rate=RATE, rngs=nnx.Rngs(dropout=5))

    keep = keep_mask(nnx.Rngs(dropout=5).dropout(), RATE, (2, 3, 7, 7))
    assert 0 < keep.mean() < 1
    got, want = both(dropped, lambda *x: plain(*x, mask, keep), inputs, grad)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bf16_gradients_are_close_and_in_bf16():
    inputs, grad, mask = draw(1, (2, 16, 2, 8), dtype=jnp.bfloat16)
    mask = mask.at[..., 0].set(True)
    got, back = jax.vjp(lambda *x: attend(*x, mask), *inputs)
    exact = [x.astype(jnp.float32) for x in inputs]
    want, plain_back = jax.vjp(lambda *x: plain(*x, mask), *exact)
    pairs = zip((got, *back(grad)), (want, *plain_back(grad.astype(jnp.float32))), strict=True)
    for one, other in pairs:
        assert one.dtype == jnp.bfloat16
        error = jnp.abs(one.astype(jnp.float32) - other).mean()
        assert error < 0.01 * jnp.abs(other).mean()


@pytest.mark.parametrize("axis", [0, 1])
def test_it_vectorises_over_anything(axis):
    inputs, grad, mask = draw(2, (6, 5, 2, 4))
    mask = mask.at[..., 0].set(True)
    lanes = [jnp.stack([x, 2 * x], axis) for x in inputs]

    def pull(q, k, v):
        return jax.vjp(lambda *x: attend(*x, mask), q, k, v)[1](grad)

    got = jax.vmap(pull, in_axes=axis)(*lanes)
    for n, factor in enumerate((1, 2)):
        for one, other in zip(got, pull(*(factor * x for x in inputs)), strict=True):
            np.testing.assert_allclose(one[n], other, atol=1e-5)


def test_a_half_precision_product_and_its_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, 8), (8, 6), (2, 5, 6)
    x, kernel, grad = map(jax.random.normal, keys, shapes)
    half_x, half_kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    multiply = functools.partial(product, jnp.float32)
    y, back = jax.vjp(multiply, half_x, half_kernel)
    exact = half_x.astype(jnp.float32), half_kernel.astype(jnp.float32)
    want, plain_back = jax.vjp(lambda x, kernel: x @ kernel, *exact)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    rounded = grad.astype(jnp.bfloat16)
    for one, other in zip(back(grad), plain_back(rounded.astype(jnp.float32)), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=8e-3, atol=1e-2)


def test_the_backward_product_multiplies_halves():
    x, kernel = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 6), jnp.bfloat16)

    def loss(x):
        return product(jnp.float32, x, kernel).sum()

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert not any("xf32>, tensor" in line.split(":")[-1] for line in products)


def test_hessian_vector_products_go_through():
    """Forward over reverse: for the curvature of a loss along an adapter."""
    inputs, _, mask = draw(4, (2, 5, 2, 4))
    mask = mask.at[..., 0].set(True)
    kernel = jax.random.normal(jax.random.key(9), (4, 4))
    q, k, v = inputs

    def ours(kernel):
        return jnp.sum(attend(product(jnp.float32, q, kernel), k, v, mask) ** 2)

    def formula(kernel):
        return jnp.sum(plain(q @ kernel, k, v, mask) ** 2)

    along = jnp.ones_like(kernel)
    got, want = (jax.jvp(jax.grad(loss), (kernel,), (along,))[1] for loss in (ours, formula))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
