"""Layer normalisation.

Shapes in names: B rows, T tokens, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; statistics in float32, output in `dtype`."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Normalises; the shape stays."""
        x = x_BxTxD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)
