"""Parts that families share: normalisation, embeddings' and linear layers' makers, the MLP.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.dense import Dense
from lorax.models.functions import ACTIVATIONS, dropout

kernel_init = nnx.initializers.normal(0.02)


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


class Maker:
    """Makes the layers of one network: they share initialisers, dtypes and the rng.

    Attributes:
      linear: (inputs, outputs, use_bias=True) -> Dense.
      embed: (rows, width) -> nnx.Embed; rows are gathered as stored, since casting a whole table
        at every step would cost more.
      norm: (width, eps=) -> LayerNorm.
      dtype: of products and activations.
      param_dtype: of the stored parameters.
      rngs: draws them.
    """

    def __init__(self, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        # One spelling of a dtype, so that graph definitions compare equal.
        self.dtype, self.param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self.rngs = rngs
        self.linear: Callable[..., Dense] = functools.partial(
            Dense,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.embed: Callable[..., nnx.Embed] = functools.partial(
            nnx.Embed, param_dtype=self.param_dtype, embedding_init=kernel_init, rngs=rngs
        )
        self.norm: Callable[..., LayerNorm] = functools.partial(
            LayerNorm, dtype=self.dtype, param_dtype=self.param_dtype
        )


class PostNormMlp(nnx.Module):
    """Feed-forward block with its residual connection and post-norm.

    Args:
      width: D.
      inner: width between the two layers.
      activation: a key of `ACTIVATIONS`.
      rate: of dropout on its output.
      eps: of the norm.
      make: the network's maker.
    """

    def __init__(
        self, width: int, inner: int, *, activation: str, rate: float, eps: float, make: Maker
    ):
        self.activation, self.rate = activation, rate
        self.up = make.linear(width, inner)
        self.down = make.linear(inner, width)
        self.norm = make.norm(width, eps=eps)

    def __call__(self, x_BxTxD: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Transforms every token by itself; the shape stays."""
        y_BxTxD = self.down(ACTIVATIONS[self.activation](self.up(x_BxTxD)))
        return self.norm(x_BxTxD + dropout(y_BxTxD, self.rate, rngs))


def split_heads(x_BxTxD: jax.Array, heads: int) -> jax.Array:
    """(B, T, D) -> (B, T, H, K)."""
    return x_BxTxD.reshape(*x_BxTxD.shape[:2], heads, -1)


def check_length(ids_BxT: jax.Array, longest: int) -> None:
    """Refuses rows of more tokens than a model has positions.

    Raises:
      LoraxError: saying which setting to change.
    """
    if ids_BxT.shape[1] > longest:
        raise LoraxError(
            f"sequence of {ids_BxT.shape[1]} tokens: this model has {longest} positions; "
            f"set task.max_length to {longest} or less"
        )


def may_attend(mask_BxT: jax.Array) -> jax.Array:
    """(B, T, S): to its own sequence's tokens; padding, as in transformers, to all of the row's."""
    query_BxTx1, key_Bx1xS = mask_BxT[:, :, None], mask_BxT[:, None, :]
    return (key_Bx1xS != 0) & ((query_BxTx1 == key_Bx1xS) | (query_BxTx1 == 0))
