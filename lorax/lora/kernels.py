"""A kernel of any number of axes, seen as (stacked) matrices of shape (d_in, d_out).

`axes` has a letter for each axis of the kernel: `i` input, `o` output, `b` stacked. A Dense
kernel is `io`, a 2-D convolution `iiio`, attention's output projection `iio`, and a kernel
of scanned layers `bio`.
"""

import math

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError


def check_axes(path: str, shape: tuple[int, ...], axes: str) -> None:
    """Refuse a string that does not describe a kernel of `shape`."""
    wrong = len(axes) != len(shape) or set(axes) - set("bio") or not {"i", "o"} <= set(axes)
    if wrong:
        raise LoraxError(
            f"kernel_axes {axes!r} do not describe {path!r} of shape {shape}: "
            "one letter an axis, i(nput), o(utput) or b (stacked), with at least one i and one o"
        )


def sizes(shape: tuple[int, ...], axes: str, letter: str) -> tuple[int, ...]:
    """Extents of the axes of one kind, in order."""
    return tuple(n for n, axis in zip(shape, axes, strict=True) if axis == letter)


def matrix_shape(shape: tuple[int, ...], axes: str) -> tuple[tuple[int, ...], int, int]:
    """(stacked shape, d_in, d_out).

    >>> matrix_shape((3, 3, 8, 16), "iiio")
    ((), 72, 16)
    >>> matrix_shape((12, 768, 768), "bio")
    ((12,), 768, 768)
    """
    d_in, d_out = (math.prod(sizes(shape, axes, letter)) for letter in "io")
    return sizes(shape, axes, "b"), d_in, d_out


def from_matrix(matrix: jax.Array, shape: tuple[int, ...], axes: str) -> jax.Array:
    """The kernel of `shape` whose matrix view is `matrix`, (*stacked, d_in, d_out)."""
    order = [n for letter in "bio" for n, axis in enumerate(axes) if axis == letter]
    grouped = matrix.reshape([shape[n] for n in order])
    return jnp.transpose(grouped, [order.index(n) for n in range(len(shape))])
