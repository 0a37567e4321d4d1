"""The feed-forward block of post-norm encoders.

Shapes in names: B rows, T tokens, D width.
"""

import jax
from flax import nnx

from lorax.models.layers.functions import ACTIVATIONS, dropout
from lorax.models.layers.maker import Maker


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
