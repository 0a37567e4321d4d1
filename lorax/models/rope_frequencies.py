"""Rotary frequencies of each kind of stretching, in the steps of transformers, which are float32.

Shapes in names: F frequencies, half a head's width.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from lorax.models.rope import Rope


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _powers(rope: "Rope", width: int) -> np.ndarray:
    """Rounded once, as PyTorch's mostly are: the last bit, times ten thousand, is another angle."""
    exponents_F = _exponents(width).astype(np.float64)
    return np.power(np.float64(rope.theta), exponents_F).astype(np.float32)


def _plain(rope: "Rope", width: int) -> np.ndarray:
    return np.float32(1) / _powers(rope, width)


def _linear(rope: "Rope", width: int) -> np.ndarray:
    return _plain(rope, width) / np.float32(rope.factor)


def _llama3(rope: "Rope", width: int) -> np.ndarray:
    plain_F, factor = _plain(rope, width), rope.factor
    length, low, high = rope.original_length, rope.low, rope.high
    waves_F = np.float32(2 * np.pi) / plain_F
    stretched_F = np.where(waves_F > length / low, plain_F / np.float32(factor), plain_F)
    share_F = (np.float32(length) / waves_F - np.float32(low)) / np.float32(high - low)
    mixed_F = (1 - share_F) * stretched_F / np.float32(factor) + share_F * stretched_F
    is_between_F = (waves_F >= length / high) & (waves_F <= length / low)
    return np.where(is_between_F, mixed_F, stretched_F)


def _yarn(rope: "Rope", width: int) -> np.ndarray:
    def index_of(turns: float) -> float:
        """Which frequency makes so many turns."""
        length = rope.original_length / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(rope.theta))

    powers_F = _powers(rope, width)
    first, last = index_of(rope.high), index_of(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0
    indices_F = np.arange(width // 2, dtype=np.float32)
    ramp_F = np.clip((indices_F - np.float32(first)) / np.float32(last - first), 0, 1)
    stretched_F = np.float32(1) / (np.float32(rope.factor) * powers_F)
    keep_F = (1 - ramp_F).astype(np.float32)
    return stretched_F * (1 - keep_F) + np.float32(1) / powers_F * keep_F


def _longrope_short(rope: "Rope", width: int) -> np.ndarray:
    return longrope(rope, width, rope.short)


def longrope(rope: "Rope", width: int, divisors: tuple[float, ...]) -> np.ndarray:
    """(F,) frequencies, each divided by its own number."""
    return np.float32(1) / (np.asarray(divisors, np.float32) * _powers(rope, width))


def dynamic(rope: "Rope", width: int, lengths: jax.Array) -> jax.Array:
    """(..., F) frequencies of long sequences, lengths (..., 1): a longer one's base is larger.

    The longest wave of a sequence is stretched by `factor` times its length over
    `original_length`, less (`factor` - 1); the shortest stays ("NTK-aware" scaling).
    """
    share = jnp.maximum(lengths, rope.original_length).astype(jnp.float32)
    stretched = rope.factor * share / rope.original_length - (rope.factor - 1)
    bases = rope.theta * stretched ** (width / (width - 2))
    exponents_F = jnp.asarray(_exponents(width))
    return 1 / bases ** exponents_F.reshape((1,) * (lengths.ndim - 1) + (-1,))


# Of sequences that are not longer than `original_length`.
FREQUENCIES: dict[str, Callable[["Rope", int], np.ndarray]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _plain,
    "longrope": _longrope_short,
}
