"""Whether a base has room, known from its config alone."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.checkpoints.placement import Shardings, is_quantized, is_sharded
from lorax.models.layers.quantization import BLOCK, KINDS
from lorax.runtime.memory import device_memory, free_host_memory


def check_memory(
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    quantized: str | None = None,
    shardings: Shardings | None = None,
    on_host: bool = False,
) -> None:
    """Refuses a base whose weights alone are more than there is room for.

    That is a device's memory where devices have their own, else the machine's free memory. What
    training needs besides is not counted.

    Args:
      wanted: dotted path to shape and dtype, as of `abstract_model`.
      quantized: as in `load_model`.
      shardings: as in `load_model`.
      on_host: as in `load_model`.

    Raises:
      LoraxError: what is needed, what there is, and what would need less.
    """
    limit = None if on_host and not shardings else device_memory()
    present = free_host_memory() if limit is None else limit
    copies = len(jax.local_devices()) if shardings and limit is None else 1
    needed = copies * base_bytes(wanted, quantized=quantized, shardings=shardings)
    if needed <= present:
        return
    if limit is None:
        found = f"{_gib(needed)}, but the machine has {_gib(present)} free"
    else:
        found = f"{_gib(needed)} a device, but a device has {_gib(present)}"
    remedies = _smaller(needed, copies, wanted, shardings)
    if limit is not None:
        remedies.append("more devices that hold a piece each (sweep.mesh.fsdp)")
    raise LoraxError(
        f"its weights need {found}: take {', or '.join([*remedies, 'a smaller base'])}"
    )


def _smaller(
    needed: int,
    copies: int,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Shardings | None,
) -> list[str]:
    """The settings that need less, with what they need, as an item or none."""
    sizes = {"bf16": copies * base_bytes(wanted, shardings=shardings, dtype=jnp.bfloat16)}
    if not shardings:  # which cut no quantized kernels
        sizes |= {kind: base_bytes(wanted, quantized=kind) for kind in KINDS}
    smaller = [f"{name} ({_gib(size)})" for name, size in sizes.items() if size < needed]
    return [f"train.base_dtype={' or '.join(smaller)}"] if smaller else []


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def base_bytes(
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    quantized: str | None = None,
    shardings: Shardings | None = None,
    dtype: DTypeLike | None = None,
) -> int:
    """Bytes of a base's weights, on each device where they are cut.

    Args:
      wanted: dotted path to shape and dtype, as of `abstract_model`.
      quantized: `int8` or `nf4` for the kernels of the base's layers.
      shardings: from a shape of the base to its devices.
      dtype: of the base, instead of that in `wanted`.
    """

    def size(path: str, want: jax.ShapeDtypeStruct) -> int:
        if quantized and is_quantized(path):
            return _quantized_bytes(want.shape, quantized)
        if not is_sharded(path):
            return math.prod(want.shape) * want.dtype.itemsize
        shape = shardings(want.shape).shard_shape(want.shape) if shardings else want.shape
        return math.prod(shape) * jnp.dtype(dtype or want.dtype).itemsize

    return sum(size(path, want) for path, want in wanted.items())


def _quantized_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Codes and float32 scales, as `quantize` makes them."""
    inputs, outputs = shape
    if kind == "int8":
        return (inputs + 4) * outputs
    blocks = math.ceil(inputs / BLOCK)
    return (blocks * BLOCK // 2 + 4 * blocks) * outputs
