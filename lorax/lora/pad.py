"""Adapters of different ranks in one shape.

Rows of A and columns of B that are zero together stay zero: each one's gradient is a multiple
of the other. A padded adapter therefore trains exactly as the unpadded one.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.lora.adapter import LoraTree


def pad(lora: LoraTree, rank: int) -> LoraTree:
    """Every pair zero-padded to `rank`.

    Raises:
      LoraxError: a pair of a higher rank.

    >>> pair = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 2))}
    >>> jax.tree.map(jnp.shape, pad({"w": pair}, 8))
    {'w': {'a': (8, 3), 'b': (4, 8)}}
    """
    return {path: _pad_pair(path, pair, rank) for path, pair in lora.items()}


def unpad(lora: LoraTree, ranks: Mapping[str, int]) -> LoraTree:
    """The adapter cut back to each target's own rank: the inverse of `pad`.

    Raises:
      LoraxError: a pair that `ranks` lacks, or that is of a lower rank.
    """
    return {path: _cut_pair(path, pair, ranks.get(path, 0)) for path, pair in lora.items()}


def _cut_pair(path: str, pair: dict[str, jax.Array], rank: int) -> dict[str, jax.Array]:
    have = pair["a"].shape[-2]
    if not 1 <= rank <= have:
        raise LoraxError(f"cannot cut {path!r} of rank {have} to rank {rank}; use 1 to {have}")
    return {"a": pair["a"][..., :rank, :], "b": pair["b"][..., :rank]}


def _pad_pair(path: str, pair: dict[str, jax.Array], rank: int) -> dict[str, jax.Array]:
    a, b = pair["a"], pair["b"]
    extra = rank - a.shape[-2]
    if extra < 0:
        raise LoraxError(f"cannot pad {path!r} of rank {a.shape[-2]} down to {rank}")
    keep = [(0, 0)] * (a.ndim - 2)
    return {
        "a": jnp.pad(a, [*keep, (0, extra), (0, 0)]),
        "b": jnp.pad(b, [*keep, (0, 0), (0, extra)]),
    }
