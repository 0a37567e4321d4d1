"""DeBERTa-v2's convolution over neighbouring tokens, beside the first layer (XL and XXL).

Shapes in names: B rows, T tokens, D width, W tokens of a window.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.models.layers.functions import ACTIVATIONS, dropout
from lorax.models.layers.maker import Maker, kernel_init

CONV_ACTIVATIONS = {"tanh": jnp.tanh, **ACTIVATIONS}


class Conv(nnx.Module):
    """A convolution, dropout and activation, added to the first layer's output and normalised.

    Args:
      width: D.
      window: W, odd.
      activation: a key of `CONV_ACTIVATIONS`.
      rate: of dropout before the activation.
      eps: of the norm.
      make: the network's maker.
    """

    def __init__(
        self, width: int, window: int, *, activation: str, rate: float, eps: float, make: Maker
    ):
        self.activation, self.rate, self.dtype = activation, rate, make.dtype
        key = make.rngs.params()
        self.taps = nnx.Param(kernel_init(key, (window, width, width), make.param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), make.param_dtype))
        self.norm = make.norm(width, eps=eps)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        residual_BxTxD: jax.Array,
        mask_BxT: jax.Array,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """The first layer's output with the convolution of its input; zero on padding.

        Args:
          x_BxTxD: embeddings.
          residual_BxTxD: the first layer's output.
          mask_BxT: which sequence of the row a token belongs to, 0 for padding: a window ends
            where a sequence does.
          rngs: stream `dropout` turns dropout on.
        """
        mask_BxT = mask_BxT.astype(jnp.int32)
        is_real_BxTx1 = (mask_BxT != 0)[..., None]
        taps_WxDxD = self.taps[...].astype(self.dtype)
        half = (taps_WxDxD.shape[0] - 1) // 2
        y_BxTxD = jnp.zeros_like(x_BxTxD) + self.bias[...].astype(self.dtype)[None, None]
        for n in range(taps_WxDxD.shape[0]):
            moved_BxTxD = _moved(x_BxTxD, n - half)
            is_own_BxTx1 = (_moved(mask_BxT, n - half) == mask_BxT)[..., None]
            y_BxTxD += jnp.where(is_own_BxTx1, moved_BxTxD, 0).astype(self.dtype) @ taps_WxDxD[n]
        y_BxTxD = dropout(jnp.where(is_real_BxTx1, y_BxTxD, 0), self.rate, rngs)
        y_BxTxD = residual_BxTxD + CONV_ACTIVATIONS[self.activation](y_BxTxD)
        return self.norm(y_BxTxD) * is_real_BxTx1.astype(self.dtype)


def _moved(x: jax.Array, by: int) -> jax.Array:
    """Along T: what stands `by` tokens further on, zero beyond the ends."""
    tokens = x.shape[1]
    padding = [(0, 0), (max(0, -by), max(0, by))] + [(0, 0)] * (x.ndim - 2)
    start = max(0, by)
    return jnp.pad(x, padding)[:, start : start + tokens]
