"""Batches as example numbers and their places, which the device expands to tokens.

A split's tokens are on the device once. A batch is two short vectors, so the host's work per step
does not grow with its tokens. `expand` returns the same batch as `lorax.data.collate`.

Shapes in names: P micro-batches, N examples each, R rows each, T tokens a row.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax.data import Encoded
from lorax.train.mesh import on_every_device, replicate, spread_rows


class DeviceSplit(NamedTuple):
    """A split on the device: its examples' tokens, concatenated.

    Attributes:
      token_ids: (tokens,) int32.
      token_types: (tokens,) uint8.
      offsets: (examples + 1,) int32: where each example starts, and the end.
      labels: (examples,).
      hidden: (tokens, width), the outputs of frozen layers; see `lorax.train.prefix`.
      features: (examples, width), the inputs of a head; see there too.
    """

    token_ids: Any
    token_types: Any
    offsets: Any
    labels: Any
    hidden: Any = None
    features: Any = None


class BatchShape(NamedTuple):
    """The static part of a batch.

    Attributes:
      parts: micro-batches P.
      rows: rows R of each.
      row_length: tokens T of a row.
      pad_id: token id of the padding.
    """

    parts: int
    rows: int
    row_length: int
    pad_id: int

    @property
    def tokens(self) -> int:
        """Tokens of the batch; padding counts."""
        return self.parts * self.rows * self.row_length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IndexedBatch:
    """A batch of a split, or one for each lane.

    Attributes:
      split: its source.
      examples: (..., P * N) int32: numbers of examples; -1 where a partial batch has none.
      starts: (..., P * N) int32: the place of each example's first token in its micro-batch's rows
        concatenated.
      shape: of the batch.
    """

    split: DeviceSplit
    examples: Any
    starts: Any
    shape: BatchShape = field(metadata={"static": True})


_SPLITS: weakref.WeakKeyDictionary[Encoded, dict[Mesh | None, DeviceSplit]] = (
    weakref.WeakKeyDictionary()
)


def device_split(encoded: Encoded, mesh: Mesh | None = None) -> DeviceSplit:
    """The split on the device, or on all devices of a mesh; it is put there once."""
    held = _SPLITS.setdefault(encoded, {})
    if mesh not in held:
        offsets = np.concatenate([[0], np.cumsum(encoded.lengths)]).astype(np.int32)
        split = DeviceSplit(
            np.concatenate(encoded.input_ids).astype(np.int32),
            np.concatenate(encoded.token_type_ids).astype(np.uint8),
            offsets,
            encoded.labels,
        )
        held[mesh] = replicate(split, mesh) if mesh else jax.tree.map(jnp.asarray, split)
    return held[mesh]


def expand(batch: IndexedBatch) -> dict[str, jax.Array]:
    """The batch in rows, with the keys, shapes and values of `lorax.data.collate`.

    It also has `hidden` (P * R, T, width) or `features` (P * N, width) if the split does.
    """
    parts, rows, row_length, pad_id = batch.shape
    split = batch.split
    is_there = batch.examples >= 0
    numbers = jnp.where(is_there, batch.examples, 0)
    offsets, ends = split.offsets[numbers], split.offsets[numbers + 1]
    lengths_PxN = jnp.where(is_there, ends - offsets, 0).reshape(parts, -1)
    starts_PxN = batch.starts.reshape(parts, -1)
    # An example's tokens are those of its split, shifted by a constant.
    shifts_PxN = offsets.reshape(parts, -1) - starts_PxN

    places = jnp.arange(rows * row_length)
    first = places[None, :, None] >= starts_PxN[:, None, :]
    covers = first & (places[None, :, None] < (starts_PxN + lengths_PxN)[:, None, :])
    segments = jnp.sum(covers * (jnp.arange(starts_PxN.shape[1]) + 1), axis=-1)
    is_token = segments > 0
    owners = jnp.maximum(segments - 1, 0)
    sources = jnp.where(is_token, places + jnp.take_along_axis(shifts_PxN, owners, axis=1), 0)
    positions = places - jnp.take_along_axis(starts_PxN, owners, axis=1)

    def in_rows(values: jax.Array, otherwise: int = 0) -> jax.Array:
        kept = jnp.where(is_token, values.astype(jnp.int32), otherwise)
        return kept.reshape(parts * rows, row_length)

    expanded = {
        "input_ids": in_rows(split.token_ids[sources], pad_id),
        "token_type_ids": in_rows(split.token_types[sources]),
        "position_ids": in_rows(positions),
        "segment_ids": in_rows(segments),
        "first_tokens": jnp.where(is_there, batch.starts, 0),
        "labels": jnp.where(is_there, split.labels[numbers], 0),
        "weights": is_there.astype(jnp.float32),
    }
    if split.hidden is not None:
        given = jnp.where(is_token[..., None], split.hidden[sources], 0)
        expanded["hidden"] = given.reshape(parts * rows, row_length, -1)
    if split.features is not None:
        expanded["features"] = jnp.where(is_there[:, None], split.features[numbers], 0)
    return spread_rows(on_every_device(expanded), axis=0)


def in_rows(batch: Any) -> dict[str, jax.Array]:
    """A batch in rows, from either form."""
    return expand(batch) if isinstance(batch, IndexedBatch) else batch
