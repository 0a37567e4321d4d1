"""Places a checkpoint's parameters on host or devices, one at a time.

What the host holds of a parameter is dropped before the next one is read.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from lorax.models.checkpoints.lazy_parameter import Bounds, LazyParameter
from lorax.models.layers.quantization import quantize

Shardings = Callable[[tuple[int, ...]], Sharding]


def is_quantized(path: str) -> bool:
    """Whether a base in few bits has this parameter in few bits: the kernels of its layers."""
    return re.fullmatch(r"(en|de)coder\.layers\..+\.kernel", path) is not None


def is_sharded(path: str) -> bool:
    """Whether `shardings` are for this parameter: all but the head's, which is trained."""
    return not path.startswith("head.")


def place(
    path: str,
    parameter: LazyParameter,
    dtype: DTypeLike,
    *,
    quantized: str | None = None,
    shardings: Shardings | None = None,
    on_host: bool = False,
) -> Any:
    """Reads a parameter and puts it where it is kept.

    Args:
      path: of the parameter.
      parameter: in the checkpoint.
      dtype: to store it in.
      quantized: `int8` or `nf4` for the kernels of the base's layers.
      shardings: from a shape of the base to its devices; each of them gets its piece alone.
      on_host: where there is no sharding, leave it as a NumPy array.

    Returns:
      An array, or a `Quantized`.
    """
    if shardings and is_sharded(path):
        return _shard(parameter, np.dtype(dtype), shardings(parameter.shape))
    put = np.asarray if on_host else jax.device_put  # `jnp.asarray` copies twice
    if quantized and is_quantized(path):
        placed = jax.tree.map(put, quantize(parameter.read(), quantized))
    else:
        placed = put(parameter.read().astype(dtype, copy=False))
    return jax.block_until_ready(placed)  # the copies that a device has not taken yet add up


def _shard(parameter: LazyParameter, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """The parameter over the devices; a process reads what its own need, each piece once."""

    @cache
    def read(bounds: Bounds) -> np.ndarray:
        return parameter.read(bounds).astype(dtype, copy=False)

    def piece(index: Any) -> np.ndarray:
        return read(tuple(s.indices(n)[:2] for s, n in zip(index, parameter.shape, strict=True)))

    return jax.block_until_ready(jax.make_array_from_callback(parameter.shape, sharding, piece))
