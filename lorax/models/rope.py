"""Rotary positions and the ways they are stretched beyond the length that a model was made for.

Shapes in names: B rows, T tokens, H heads, K width of a head, F frequencies (K / 2).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError

Rotation = tuple[jax.Array, jax.Array]
# Kinds of rotary positions, and what config.json has to say of each.
_KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"},
    "yarn": {"factor": "factor"},
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are stretched.

    Attributes:
      kind: `default`; `linear` divides positions by `factor`; `llama3` (Llama 3.1) does so for
        wavelengths above `original_length / low`, not below `original_length / high`, and goes
        over from one to the other between; `yarn` (Peng et al. 2023, arXiv:2309.00071) by the
        turns that a frequency makes in `original_length`: below `low`, not above `high`.
      theta: base of the wavelengths.
      factor: of all kinds but the default.
      low: `low_freq_factor`, or yarn's `beta_slow`.
      high: `high_freq_factor`, or yarn's `beta_fast`.
      original_length: tokens of a sequence before the stretching.
      scale: on cosines and sines: yarn's `attention_factor`.
      truncate: yarn's limits are rounded to whole frequencies.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192
    scale: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Rope":
        """Reads `rope_parameters`, or `rope_scaling` and `rope_theta` of before transformers 5.

        Raises:
          LoraxError: a kind that is not served, or one without its numbers.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _KINDS or any(isinstance(value, dict) for value in given.values()):
            kind = kind if kind not in _KINDS else "one for each kind of layer"
            raise LoraxError(f"config.json: rope_type={kind!r} is not one of: {', '.join(_KINDS)}")
        if given.get("partial_rotary_factor") not in (None, 1.0):
            share = given["partial_rotary_factor"]
            raise LoraxError(f"config.json: partial_rotary_factor={share} is not one of: 1.0")
        theta = float(given.get("rope_theta") or config.get("rope_theta") or cls.theta)
        needed = _KINDS[kind]
        if absent := [name for name in needed.values() if given.get(name) is None]:
            raise LoraxError(f"config.json: rope_type={kind!r} without {', '.join(absent)}")
        numbers: dict[str, Any] = {field: float(given[name]) for field, name in needed.items()}
        rope = cls(kind, theta, **numbers)
        if kind in ("default", "linear"):
            return rope
        name = "original_max_position_embeddings"
        length = config.get(name) or given.get(name) or config.get("max_position_embeddings", 2048)
        rope = dataclasses.replace(rope, original_length=length)
        return rope if kind == "llama3" else dataclasses.replace(rope, **_yarn(given))

    def rotation(self, positions_BxT: jax.Array, width: int) -> Rotation:
        """Cosines and sines, (B, T, 1, F) each, in float32; `width` is K."""
        positions_BxTx1x1 = positions_BxT.astype(jnp.float32)[:, :, None, None]
        frequencies_F = jnp.asarray(self.frequencies(width))
        angles_BxTx1xF = positions_BxTx1x1 * frequencies_F[None, None, None]
        rotation = jnp.cos(angles_BxTx1xF), jnp.sin(angles_BxTx1xF)
        return rotation if self.scale == 1 else (self.scale * rotation[0], self.scale * rotation[1])

    def frequencies(self, width: int) -> np.ndarray:
        """(F,) radians a position, in the steps of transformers, which are float32.

        Powers are rounded once, as PyTorch's mostly are: the last bit, times a position of some
        ten thousands, is another angle.
        """
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        powers = np.power(np.float64(self.theta), exponents.astype(np.float64)).astype(np.float32)
        plain_F = np.float32(1) / powers
        if self.kind == "linear":
            return plain_F / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(plain_F)
        return self._yarn(powers, width) if self.kind == "yarn" else plain_F

    def _llama3(self, plain_F: np.ndarray) -> np.ndarray:
        length, low, high, factor = self.original_length, self.low, self.high, self.factor
        waves_F = np.float32(2 * np.pi) / plain_F
        stretched_F = np.where(waves_F > length / low, plain_F / np.float32(factor), plain_F)
        share_F = (np.float32(length) / waves_F - np.float32(low)) / np.float32(high - low)
        mixed_F = (1 - share_F) * stretched_F / np.float32(factor) + share_F * stretched_F
        is_between_F = (waves_F >= length / high) & (waves_F <= length / low)
        return np.where(is_between_F, mixed_F, stretched_F)

    def _yarn(self, powers_F: np.ndarray, width: int) -> np.ndarray:
        def index_of(turns: float) -> float:
            """Which frequency makes so many turns."""
            length = self.original_length / (turns * 2 * math.pi)
            return width * math.log(length) / (2 * math.log(self.theta))

        first, last = index_of(self.high), index_of(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last += 0.001 if first == last else 0
        indices_F = np.arange(width // 2, dtype=np.float32)
        ramp_F = np.clip((indices_F - np.float32(first)) / np.float32(last - first), 0, 1)
        stretched_F = np.float32(1) / (np.float32(self.factor) * powers_F)
        keep_F = (1 - ramp_F).astype(np.float32)
        return stretched_F * (1 - keep_F) + np.float32(1) / powers_F * keep_F


def _yarn(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` say of yarn, or the paper's values."""
    scale = given.get("attention_factor")
    if scale is None:
        factor = float(given["factor"])
        above, below = given.get("mscale"), given.get("mscale_all_dim")
        scale = _mscale(factor, 1.0)
        if above and below:
            scale = _mscale(factor, above) / _mscale(factor, below)
    low, high = (given.get(name) or value for name, value in (("beta_slow", 1), ("beta_fast", 32)))
    truncate = given.get("truncate", True)
    return {"low": float(low), "high": float(high), "scale": float(scale), "truncate": truncate}


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def rotate(x_BxTxHxK: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs of the first half's and the second half's elements; the shape stays."""
    cos_BxTx1xF, sin_BxTx1xF = rotation
    x_BxTxHxF, y_BxTxHxF = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = (
        x_BxTxHxF * cos_BxTx1xF - y_BxTxHxF * sin_BxTx1xF,
        y_BxTxHxF * cos_BxTx1xF + x_BxTxHxF * sin_BxTx1xF,
    )
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxHxK.dtype)
