"""Makes the layers of a network with shared initializers, dtypes and rng."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.models.layers.dense import Dense
from lorax.models.layers.norm import LayerNorm

kernel_init = nnx.initializers.normal(0.02)


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
