"""A Dense layer whose frozen kernel may be half precision or quantized.

Shapes in names: I inputs, O outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.models.layers import quantization
from lorax.models.layers.quantization import Quantized


class Dense(nnx.Linear):
    """`nnx.Linear` with backward products in the dtype of the forward ones.

    JAX's own derivative multiplies a float32 gradient by a bfloat16 kernel in float32, at half
    the rate. Rounding the gradient first is what autocast does in PyTorch.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """(..., I) -> (..., O), in `product_dtype` of the layer's compute dtype."""
        del out_sharding
        dtype = jnp.dtype(self.dtype)
        x, kernel, out = inputs.astype(dtype), self.kernel.get_value(), product_dtype(dtype)
        if isinstance(kernel, Quantized):
            y = quantization.product(out, x, kernel)
        else:
            y = product(out, x, kernel.astype(dtype))
        if self.bias is None:
            return y
        return y + jnp.reshape(self.bias.get_value().astype(out), (1,) * (y.ndim - 1) + (-1,))


def product_dtype(dtype: DTypeLike) -> Any:
    """What a product of operands of `dtype` comes out in.

    On a CPU a bfloat16 product that comes out in bfloat16 runs at a third of the rate.
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(out: DTypeLike, x: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """X times the kernel, (..., I) -> (..., O) in dtype `out`; x and kernel have one dtype."""
    return _einsum("...i,io->...o", out, x, kernel_IxO)


def _einsum(equation: str, out: DTypeLike, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=out)


def _product_forward(out: DTypeLike, x: jax.Array, kernel_IxO: jax.Array) -> Any:
    return _einsum("...i,io->...o", out, x, kernel_IxO), (x, kernel_IxO)


def _product_backward(out: DTypeLike, kept: Any, grad: jax.Array) -> Any:
    x, kernel_IxO = kept
    grad = grad.astype(x.dtype)
    x_grad = _einsum("...o,io->...i", out, grad, kernel_IxO)
    kernel_grad = _einsum("...i,...o->io", out, x, grad)
    return x_grad.astype(x.dtype), kernel_grad.astype(kernel_IxO.dtype)


product.defvjp(_product_forward, _product_backward)
