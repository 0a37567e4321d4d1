"""Rotary positions and the ways they are stretched beyond the length that a model was made for.

Shapes in names: B rows, T tokens, H heads, K width of a head, F frequencies (K / 2).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError, brief
from lorax.models.options import Factor, Length, Positive, read_option

Rotation = tuple[jax.Array, jax.Array]
# Kinds of rotary positions, and what config.json has to say of each.
_KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"},
    "yarn": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "longrope": {"short": "short_factor", "long": "long_factor"},
}
_BY_LENGTH = ("dynamic", "longrope")
# What config.json may say, beside rope_parameters and in them.
_BESIDE: dict[str, Any] = {
    "rope_parameters": dict,
    "rope_scaling": dict,
    "rope_theta": Positive,
    "original_max_position_embeddings": Length,
    "max_position_embeddings": Length,
}
_INSIDE: dict[str, Any] = {
    "rope_type": str,
    "type": str,
    "rope_theta": Positive,
    "factor": Positive,
    "low_freq_factor": Positive,
    "high_freq_factor": Positive,
    "beta_slow": Positive,
    "beta_fast": Positive,
    "attention_factor": Positive,
    "mscale": Factor,
    "mscale_all_dim": Factor,
    "truncate": bool,
    "short_factor": tuple[Positive, ...],
    "long_factor": tuple[Positive, ...],
    "original_max_position_embeddings": Length,
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are stretched.

    Attributes:
      kind: `default`; `linear` divides positions by `factor`; `llama3` (Llama 3.1) does so for
        wavelengths above `original_length / low`, not below `original_length / high`, and goes
        over from one to the other between; `yarn` (Peng et al. 2023, arXiv:2309.00071) by the
        turns that a frequency makes in `original_length`: below `low`, not above `high`;
        `dynamic` raises the base of sequences longer than `original_length`; `longrope` (Ding et
        al. 2024, arXiv:2402.13753) divides each frequency by a number of its own, another one in
        these sequences. In both, a sequence's own length counts, not its neighbours' in a batch.
      theta: base of the wavelengths.
      factor: of all kinds but the default and longrope.
      low: `low_freq_factor`, or yarn's `beta_slow`.
      high: `high_freq_factor`, or yarn's `beta_fast`.
      original_length: tokens of a sequence before the stretching.
      scale: on cosines and sines: `attention_factor` of yarn and longrope.
      truncate: yarn's limits are rounded to whole frequencies.
      short: longrope's divisors of the F frequencies.
      long: longrope's in sequences longer than `original_length`.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192
    scale: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Rope":
        """Reads `rope_parameters`, or `rope_scaling` and `rope_theta` of before transformers 5.

        Where both are given, the reference's precedence holds: a `rope_scaling` that is not empty
        replaces `rope_parameters` as a whole, `rope_type` goes before `type`, a `rope_theta` inside
        before one outside, and an `original_max_position_embeddings` outside before one inside.

        Raises:
          LoraxError: a kind that is not served, one without its numbers, or a value of the wrong
            type or out of range.
        """
        config = _checked(config, _BESIDE)
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        given = _checked(given, _INSIDE)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _KINDS or any(isinstance(value, dict) for value in given.values()):
            kind = kind if kind not in _KINDS else "one for each kind of layer"
            known = ", ".join(_KINDS)
            raise LoraxError(f"config.json: rope_type={brief(kind)} is not one of: {known}")
        if (share := given.get("partial_rotary_factor", 1.0)) != 1:
            share = brief(share)
            raise LoraxError(f"config.json: partial_rotary_factor={share} is not one of: 1.0")
        theta = float(given.get("rope_theta", config.get("rope_theta", cls.theta)))
        if kind == "yarn" and theta <= 1:
            raise LoraxError(f"config.json: rope_theta={theta} is not above 1, as yarn needs it")
        needed = _KINDS[kind]
        if absent := [name for name in needed.values() if name not in given]:
            raise LoraxError(f"config.json: rope_type={kind!r} without {', '.join(absent)}")
        rope = cls(kind, theta, **{field: given[name] for field, name in needed.items()})
        if kind in ("default", "linear"):
            return rope
        length = most = config.get("max_position_embeddings", 2048)
        if kind != "dynamic":
            name = "original_max_position_embeddings"
            length = config.get(name) or given.get(name) or most
        rope = dataclasses.replace(rope, original_length=length)
        if kind == "yarn":
            return dataclasses.replace(rope, **_yarn_options(given))
        if kind == "longrope":
            return dataclasses.replace(rope, scale=_longrope_scale(given, most, length))
        return rope

    def rotation(
        self, positions_BxT: jax.Array, width: int, sequences_BxT: jax.Array | None = None
    ) -> Rotation:
        """Cosines and sines, (B, T, 1, F) each, in float32.

        Args:
          positions_BxT: int positions in each sequence, from 0.
          width: K.
          sequences_BxT: which sequence of its row a token is of, for kinds that turn by a
            sequence's length, which is that of its last token here; None: a sequence a row.
        """
        frequencies_BxTx1xF = self._frequencies(positions_BxT, width, sequences_BxT)
        angles_BxTx1xF = positions_BxT.astype(jnp.float32)[:, :, None, None] * frequencies_BxTx1xF
        rotation = jnp.cos(angles_BxTx1xF), jnp.sin(angles_BxTx1xF)
        return rotation if self.scale == 1 else (self.scale * rotation[0], self.scale * rotation[1])

    def _frequencies(
        self, positions_BxT: jax.Array, width: int, sequences_BxT: jax.Array | None
    ) -> jax.Array:
        """Radians a position: (B, T, 1, F), or (1, 1, 1, F) where lengths do not count."""
        plain_1x1x1xF = jnp.asarray(self.frequencies(width))[None, None, None]
        if self.kind not in _BY_LENGTH:
            return plain_1x1x1xF
        if sequences_BxT is None:
            sequences_BxT = jnp.zeros_like(positions_BxT)
        lengths_BxTx1x1 = _lengths(positions_BxT, sequences_BxT)[:, :, None, None]
        if self.kind == "dynamic":
            long_BxTx1xF = dynamic(self, width, lengths_BxTx1x1)
        else:
            long_BxTx1xF = jnp.asarray(_longrope(self, width, self.long))[None, None, None]
        return jnp.where(lengths_BxTx1x1 > self.original_length, long_BxTx1xF, plain_1x1x1xF)

    def frequencies(self, width: int) -> np.ndarray:
        """(F,) radians a position, of sequences not longer than `original_length`."""
        return _FREQUENCIES[self.kind](self, width)

    def reach(self, max_positions: int) -> int:
        """Most tokens a sequence, of a model whose `max_position_embeddings` is this.

        That is the length before stretching where `dynamic` or `yarn` is added to a model; of the
        other kinds it says how far they were stretched.
        """
        if self.kind == "dynamic":
            return int(self.factor * max_positions)
        if self.kind == "yarn":
            return max(max_positions, int(self.factor * self.original_length))
        return max_positions

    def check_width(self, width: int) -> None:
        """Refuses heads that cannot be turned so.

        Raises:
          LoraxError: naming what does not fit.
        """
        if width % 2:
            raise LoraxError(f"head_dim={width} is odd: rotary positions turn pairs")
        if self.kind == "dynamic" and width == 2:
            raise LoraxError("rope_type='dynamic' stretches no wave of head_dim=2")
        for name, given in (("short_factor", self.short), ("long_factor", self.long)):
            if self.kind == "longrope" and len(given) != width // 2:
                raise LoraxError(
                    f"config.json: {name} has {len(given)} numbers for the {width // 2} "
                    f"frequencies of head_dim={width}"
                )


def _checked(given: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Options without nulls, those of `kinds` checked, lists as tuples."""
    found = {name: value for name, value in given.items() if value is not None}
    return found | {name: read_option(found, name, kinds[name]) for name in kinds.keys() & found}


def _lengths(positions_BxT: jax.Array, sequences_BxT: jax.Array) -> jax.Array:
    """(B, T): tokens of each token's sequence, up to its last one here."""
    is_same_BxTxT = sequences_BxT[:, :, None] == sequences_BxT[:, None, :]
    return jnp.where(is_same_BxTxT, positions_BxT[:, None, :], 0).max(2) + 1


def _longrope_scale(given: Mapping[str, Any], most: int, length: int) -> float:
    """What `rope_parameters` say, or the paper's value."""
    if "attention_factor" in given:
        return float(given["attention_factor"])
    factor = given.get("factor", most / length)
    if factor <= 1 or length == 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(length))


def _yarn_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` say of yarn, or the paper's values."""
    scale = given.get("attention_factor")
    if scale is None:
        factor = given["factor"]
        above, below = given.get("mscale"), given.get("mscale_all_dim")
        scale = _mscale(factor, 1.0)
        if above and below:
            scale = _mscale(factor, above) / _mscale(factor, below)
    low, high = (given.get(name) or value for name, value in (("beta_slow", 1), ("beta_fast", 32)))
    truncate = given.get("truncate", True)
    return {"low": float(low), "high": float(high), "scale": float(scale), "truncate": truncate}


def _mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _exponents(width: int) -> np.ndarray:
    return np.arange(0, width, 2, dtype=np.float32) / np.float32(width)


def _powers(rope: Rope, width: int) -> np.ndarray:
    """Rounded once, as PyTorch's mostly are: the last bit, times ten thousand, is another angle."""
    exponents_F = _exponents(width).astype(np.float64)
    return np.power(np.float64(rope.theta), exponents_F).astype(np.float32)


def _plain(rope: Rope, width: int) -> np.ndarray:
    return np.float32(1) / _powers(rope, width)


def _linear(rope: Rope, width: int) -> np.ndarray:
    return _plain(rope, width) / np.float32(rope.factor)


def _llama3(rope: Rope, width: int) -> np.ndarray:
    plain_F, factor = _plain(rope, width), rope.factor
    length, low, high = rope.original_length, rope.low, rope.high
    waves_F = np.float32(2 * np.pi) / plain_F
    stretched_F = np.where(waves_F > length / low, plain_F / np.float32(factor), plain_F)
    share_F = (np.float32(length) / waves_F - np.float32(low)) / np.float32(high - low)
    mixed_F = (1 - share_F) * stretched_F / np.float32(factor) + share_F * stretched_F
    is_between_F = (waves_F >= length / high) & (waves_F <= length / low)
    return np.where(is_between_F, mixed_F, stretched_F)


def _yarn_frequencies(rope: Rope, width: int) -> np.ndarray:
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


def _longrope_short(rope: Rope, width: int) -> np.ndarray:
    return _longrope(rope, width, rope.short)


def _longrope(rope: Rope, width: int, divisors: tuple[float, ...]) -> np.ndarray:
    """(F,) frequencies, each divided by its own number."""
    return np.float32(1) / (np.asarray(divisors, np.float32) * _powers(rope, width))


def dynamic(rope: Rope, width: int, lengths: jax.Array) -> jax.Array:
    """(..., F) frequencies of long sequences, lengths (..., 1): a longer one's base is larger.

    The longest wave of a sequence is stretched by `factor` times its length over
    `original_length`, less (`factor` - 1); the shortest stays ("NTK-aware" scaling).
    """
    share = jnp.maximum(lengths, rope.original_length).astype(jnp.float32)
    stretched = rope.factor * share / rope.original_length - (rope.factor - 1)
    bases = rope.theta * stretched ** (width / (width - 2))
    exponents_F = jnp.asarray(_exponents(width))
    return 1 / bases ** exponents_F.reshape((1,) * (lengths.ndim - 1) + (-1,))


# Of sequences that are not longer than `original_length`. The float32 steps are transformers' own.
_FREQUENCIES: dict[str, Callable[[Rope, int], np.ndarray]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn_frequencies,
    "dynamic": _plain,
    "longrope": _longrope_short,
}


def rotate(x_BxTxHxK: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs of the first half's and the second half's elements; the shape stays."""
    cos_BxTx1xF, sin_BxTx1xF = rotation
    x_BxTxHxF, y_BxTxHxF = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = (
        x_BxTxHxF * cos_BxTx1xF - y_BxTxHxF * sin_BxTx1xF,
        y_BxTxHxF * cos_BxTx1xF + x_BxTxHxF * sin_BxTx1xF,
    )
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxHxK.dtype)
