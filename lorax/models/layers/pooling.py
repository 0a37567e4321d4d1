"""What is read of hidden states, and what is given of them: first tokens, sums, a prefix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prefix(NamedTuple):
    """What the first layers of a network have computed already.

    Attributes:
      layers: how many.
      outputs: of the last of them, (B, T, D).
    """

    layers: int
    outputs: jax.Array


class FirstTokens(NamedTuple):
    """Asks for the first token of each sequence alone.

    Attributes:
      places: (N,) of them in the rows laid end to end; None where each row is a sequence.
    """

    places: jax.Array | None

    def tokens(self, x_BxTxD: jax.Array) -> jax.Array:
        """What is asked for, of states, masks or positions: (N, 1, D)."""
        if self.places is None:
            return x_BxTxD[:, :1]
        return x_BxTxD.reshape(-1, x_BxTxD.shape[-1])[self.places][:, None]

    def rows(self, x_BxSxHxK: jax.Array) -> jax.Array:
        """The rows that they lie in: (N, S, H, K)."""
        if self.places is None:
            return x_BxSxHxK
        rows, tokens = x_BxSxHxK.shape[:2]
        # A product: its gradient is one, too, which adds in the same order on every device.
        is_in_NxB = jax.nn.one_hot(self.places // tokens, rows, dtype=x_BxSxHxK.dtype)
        return jnp.einsum(
            "nb,bshk->nshk", is_in_NxB, x_BxSxHxK, precision=jax.lax.Precision.HIGHEST
        )


def sum_by_sequence(
    x_BxTxD: jax.Array, numbers_BxT: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Sums over each sequence's tokens, and how many these are.

    Args:
      x_BxTxD: float32.
      numbers_BxT: which sequence of the batch a token belongs to, from 1; 0 is padding.
      count: sequences N.

    Returns:
      (N, D) and (N, 1).
    """
    numbers_Nx1 = 1 + jnp.arange(count)[:, None]
    # A product, which adds in the same order on every device; a scatter may not.
    is_in_NxBT = (numbers_BxT.reshape(1, -1) == numbers_Nx1).astype(jnp.float32)
    flat_BTxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
    total_NxD = jnp.matmul(is_in_NxBT, flat_BTxD, precision=jax.lax.Precision.HIGHEST)
    return total_NxD, is_in_NxBT.sum(1, keepdims=True)
