"""Causal attention: its mask, positions, and the cache of keys and values.

Shapes in names: B rows, T tokens of a call, S attended columns (= T without a cache),
H heads, K width of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.layers.attention import attend


class KVCache(NamedTuple):
    """Keys and values of the columns that a decoder has seen, in room for more.

    Attributes:
      keys: of each layer, (B, S, H, K), as attended (turned by their positions, if they are).
      values: of each layer, (B, S, H, K).
      mask: the attention mask of the columns, (B, S); 0 in those to come.
      next: the column that the next token takes, an int32 scalar.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    next: jax.Array

    @classmethod
    def empty(
        cls, config: Any, batch: int, length: int, dtype: DTypeLike = jnp.float32
    ) -> "KVCache":
        """Room for `length` columns of `batch` rows.

        Args:
          config: a decoder's architecture.
          batch: B.
          length: S, the padding's columns included.
          dtype: of keys and values.
        """
        shape = batch, length, config.num_key_value_heads, config.head_dim
        zeros = [jnp.zeros(shape, dtype) for _ in range(2 * config.num_hidden_layers)]
        mask_BxS = jnp.zeros((batch, length), jnp.int32)
        keys, values = zeros[::2], zeros[1::2]
        return cls(tuple(keys), tuple(values), mask_BxS, jnp.zeros((), jnp.int32))


class Past(NamedTuple):
    """A layer's share of a cache.

    Attributes:
      keys: (B, S, H, K).
      values: (B, S, H, K).
      next: the column that the next token takes.
    """

    keys: jax.Array
    values: jax.Array
    next: jax.Array

    def extended(self, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array) -> "Past":
        """With the columns of a call written; `next` stays, as the other layers need it, too."""
        keys = _write(self.keys, k_BxTxHxK, self.next)
        return Past(keys, _write(self.values, v_BxTxHxK, self.next), self.next)


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


class Columns(NamedTuple):
    """Which sequence the tokens of a call and all columns they may attend to belong to.

    Attributes:
      query: numbers of the call's tokens, (B, T); 0 is padding.
      key: numbers of the columns, (B, S); 0 is padding, or still to come.
      start: the column of the call's first token.
    """

    query: jax.Array
    key: jax.Array
    start: jax.Array | int

    def may_attend(self, window: int | None = None) -> jax.Array:
        """(B, T, S): to the same sequence's columns up to the token's own, the last `window`."""
        query_BxTx1, key_Bx1xS = self.query[:, :, None], self.key[:, None, :]
        own_BxTxS = (key_Bx1xS != 0) & ((query_BxTx1 == key_Bx1xS) | (query_BxTx1 == 0))
        query_1xTx1 = (self.start + jnp.arange(self.query.shape[1]))[None, :, None]
        behind_1xTxS = query_1xTx1 - jnp.arange(self.key.shape[1])[None, None]
        near_1xTxS = behind_1xTxS >= 0
        if window is not None:
            near_1xTxS &= behind_1xTxS < window
        return own_BxTxS & near_1xTxS


def columns(mask_BxT: jax.Array, cache: KVCache | None) -> Columns:
    """The columns of a call.

    Raises:
      LoraxError: the cache has no room for them; where its `next` is traced, that is known only
        of a call longer than the whole cache.
    """
    mask_BxT = jnp.asarray(mask_BxT).astype(jnp.int32)
    if cache is None:
        return Columns(mask_BxT, mask_BxT, 0)
    room, more, start = cache.mask.shape[1], mask_BxT.shape[1], cache.next
    filled = 0 if isinstance(start, jax.core.Tracer) else int(start)
    if filled + more > room:
        raise LoraxError(
            f"cache of {room} columns, {filled} of them filled: no room for {more} more"
        )
    return Columns(mask_BxT, _write(cache.mask, mask_BxT, start), start)


def count_positions(mask_BxT: jax.Array, cache: KVCache | None) -> jax.Array:
    """(B, T): how many real tokens a row has before each, in the cache and the call."""
    real_BxT = (jnp.asarray(mask_BxT) != 0).astype(jnp.int32)
    before_BxT = jnp.cumsum(real_BxT, axis=1) - real_BxT
    if cache is None:
        return before_BxT
    return before_BxT + (cache.mask != 0).astype(jnp.int32).sum(1, keepdims=True)


def attend_to_past(
    q_BxTxHxK: jax.Array,
    k_BxTxHxK: jax.Array,
    v_BxTxHxK: jax.Array,
    mask_BxTxS: jax.Array,
    past: Past | None,
    *,
    implementation: str,
    **options: Any,
) -> tuple[jax.Array, Past | None]:
    """`attend` over the columns of a call, or those of the cache with them; and the cache's share.

    Args:
      q_BxTxHxK: queries.
      k_BxTxHxK: keys of the call.
      v_BxTxHxK: values of the call.
      mask_BxTxS: where to attend.
      past: the layer's share of a cache; None: there is none.
      implementation: without a cache; fused kernels are not made for one query.
      options: of `attend`.
    """
    if past is None:
        k_BxSxHxK, v_BxSxHxK = k_BxTxHxK, v_BxTxHxK
    else:
        past, implementation = past.extended(k_BxTxHxK, v_BxTxHxK), "einsum"
        k_BxSxHxK, v_BxSxHxK = (x.astype(q_BxTxHxK.dtype) for x in past[:2])
    y_BxTxHxK = attend(
        q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask_BxTxS, implementation=implementation, **options
    )
    return y_BxTxHxK, past


def grown(pasts: list[Past], seen: Columns) -> KVCache:
    """The cache after a call."""
    after = jnp.asarray(seen.start + seen.query.shape[1], jnp.int32)
    keys, values, _ = zip(*pasts, strict=True)
    return KVCache(keys, values, seen.key, after)
