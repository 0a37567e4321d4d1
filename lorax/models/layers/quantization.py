"""Frozen kernels in 8 or 4 bits, and the product with one.

Shapes in names: I inputs, O outputs of a kernel, G blocks of inputs, P pairs of inputs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey
from jax.typing import DTypeLike

from lorax.errors import LoraxError

KINDS = ("int8", "nf4")
BLOCK = 64  # inputs that share a scale in nf4 (Dettmers et al. 2023, section 3)
# The sixteen values of NormalFloat4 (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Quantized:
    """A kernel (I, O) in few bits.

    Attributes:
      codes: `int8`: (I, O) int8. `nf4`: (P, O) uint8, two inputs a byte: the low half holds the
        first P of them, the high half the others.
      scales: `int8`: (1, O) float32, of each output. `nf4`: (G, O) float32, of each block of
        inputs.
      kind: `int8` or `nf4`.
      inputs: I; the last block of `nf4` may be filled up with zeros.
    """

    codes: Any
    scales: Any
    kind: str
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O), as of the kernel it stands for."""
        return self.inputs, self.codes.shape[-1]

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def dtype(self) -> DTypeLike:
        """Float32: what it stands for."""
        return jnp.dtype(jnp.float32)

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[str, int]]:
        """Its arrays, under the names that they have in a path."""
        children = (DictKey("codes"), self.codes), (DictKey("scales"), self.scales)
        return children, (self.kind, self.inputs)

    @classmethod
    def tree_unflatten(cls, static: tuple[str, int], children: Any) -> "Quantized":
        """The inverse."""
        return cls(children[0], children[1], *static)


def quantize(kernel: Any, kind: str) -> Quantized:
    """Round a kernel (I, O) to 8 or 4 bits a weight, on the host.

    `int8` scales each output by its largest weight (Dettmers et al. 2022, section 2.1, of the
    weights alone). `nf4` scales each block of 64 inputs of an output by its largest weight and
    takes the nearest of 16 values (Dettmers et al. 2023, section 3), without quantizing scales.

    Raises:
      LoraxError: an unknown kind, or a kernel that is no matrix.

    >>> kernel = np.linspace(-1, 1, 128, dtype=np.float32).reshape(64, 2)
    >>> small = quantize(kernel, "nf4")
    >>> small.codes.shape, small.scales.shape, bool(abs(dequantize(small) - kernel).max() < 0.16)
    ((32, 2), (1, 2), True)
    """
    kernel_IxO = np.asarray(kernel, np.float32)
    if kind not in KINDS or kernel_IxO.ndim != 2:
        raise LoraxError(
            f"a kernel of shape {kernel_IxO.shape} as {kind!r}: only matrices are quantized, to "
            f"{' or '.join(KINDS)}"
        )
    if kind == "int8":
        scales_1xO = np.abs(kernel_IxO).max(0, keepdims=True) / 127
        codes_IxO = np.rint(kernel_IxO / _not_zero(scales_1xO)).astype(np.int8)
        return Quantized(codes_IxO, scales_1xO, kind, len(kernel_IxO))
    inputs, outputs = kernel_IxO.shape
    filled = np.pad(kernel_IxO, ((0, -inputs % BLOCK), (0, 0)))
    blocks_GxBxO = filled.reshape(-1, BLOCK, outputs)
    scales_GxO = np.abs(blocks_GxBxO).max(1)
    unit_IxO = (blocks_GxBxO / _not_zero(scales_GxO)[:, None]).reshape(filled.shape)
    middles = (np.asarray(NF4[1:], np.float32) + np.asarray(NF4[:-1], np.float32)) / 2
    low_PxO, high_PxO = np.split(np.searchsorted(middles, unit_IxO).astype(np.uint8), 2)
    return Quantized(low_PxO | (high_PxO << 4), scales_GxO, kind, inputs)


def _not_zero(scales: np.ndarray) -> np.ndarray:
    return np.where(scales == 0, np.float32(1), scales)


def dequantize(kernel: Quantized, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The kernel (I, O) that it stands for."""
    if kernel.kind == "int8":
        return (kernel.codes.astype(jnp.float32) * kernel.scales).astype(dtype)
    codes_IxO = jnp.concatenate([kernel.codes & 15, kernel.codes >> 4])
    values_IxO = jnp.take(jnp.asarray(NF4, jnp.float32), codes_IxO.astype(jnp.int32), axis=0)
    blocks_GxBxO = values_IxO.reshape(-1, BLOCK, values_IxO.shape[-1])
    scaled_GxBxO = blocks_GxBxO * kernel.scales[:, None]
    return scaled_GxBxO.reshape(values_IxO.shape)[: kernel.inputs].astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(out: DTypeLike, x: jax.Array, kernel: Quantized) -> jax.Array:
    """X times the kernel, (..., I) -> (..., O) in dtype `out`.

    The kernel has no gradient. It is dequantized for each product anew, so that no more than one
    layer's weights exist in full at a time.
    """
    return _einsum("...i,io->...o", out, x, kernel)


def _einsum(equation: str, out: DTypeLike, x: jax.Array, kernel: Quantized) -> jax.Array:
    x, kernel = jax.lax.optimization_barrier((x, kernel))  # not before x is there
    full = dequantize(kernel, x.dtype)
    return jnp.einsum(equation, x, full, preferred_element_type=out)


def _product_forward(out: DTypeLike, x: jax.Array, kernel: Quantized) -> Any:
    return _einsum("...i,io->...o", out, x, kernel), (kernel, jnp.zeros((0,), x.dtype))


def _product_backward(out: DTypeLike, kept: Any, grad: jax.Array) -> Any:
    kernel, like_x = kept
    grad = grad.astype(like_x.dtype)
    return _einsum("...o,io->...i", out, grad, kernel).astype(like_x.dtype), None


product.defvjp(_product_forward, _product_backward)
