"""Transforms a model's logits to those that tokens are sampled from.

Shapes in names: N rows, S columns, V words.
"""

import jax
import jax.numpy as jnp


def warp(
    logits_NxV: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Temperature, then top-k, then top-p: -inf on the excluded words, (N, V).

    Both cuts keep all words that are as probable as the last one kept. Top-p keeps the fewest
    most probable words whose probabilities, after the other two, sum to `top_p` or more.

    Args:
      logits_NxV: of a model.
      temperature: above 0.
      top_k: an int; 0 keeps all words, and so does one above V.
      top_p: in (0, 1].

    >>> logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    >>> [bool(x) for x in jnp.isfinite(warp(logits, 1.0, 0, 0.75))[0]]
    [True, True, False, False]
    """
    logits_NxV = logits_NxV / temperature
    ascending_NxV = jnp.sort(logits_NxV, axis=-1)
    words = logits_NxV.shape[-1]
    first = jnp.where(top_k > 0, jnp.maximum(words - top_k, 0), 0)
    least_Nx1 = jax.lax.dynamic_slice_in_dim(ascending_NxV, first, 1, axis=1)
    ascending_NxV = jnp.where(ascending_NxV < least_Nx1, -jnp.inf, ascending_NxV)
    # Summed from the least probable on, where small numbers are added to small ones.
    below_NxV = jnp.cumsum(jax.nn.softmax(ascending_NxV, axis=-1), axis=-1)
    is_kept_NxV = (below_NxV > 1 - top_p).at[:, -1].set(True)
    kept_NxV = jnp.where(is_kept_NxV, ascending_NxV, jnp.inf)
    least_p_Nx1 = jnp.where(top_p < 1, kept_NxV.min(-1, keepdims=True), -jnp.inf)
    is_cut_NxV = logits_NxV < jnp.maximum(least_Nx1, least_p_Nx1)
    return jnp.where(is_cut_NxV, -jnp.inf, logits_NxV)


def penalize_repeats(
    scores_NxV: jax.Array,
    ids_NxS: jax.Array,
    is_token_NxS: jax.Array,
    end: jax.Array,
    penalty: jax.Array,
) -> jax.Array:
    """Scores of the words that came before, divided by `penalty`, or times it if negative, (N, V).

    Keskar et al. 2019 (arXiv:1909.05858), section 4.1.

    Args:
      scores_NxV: of the tokens of column `end`.
      ids_NxS: token ids.
      is_token_NxS: False on padding.
      end: columns from here on are still to come.
      penalty: above 0; 1 changes nothing.
    """
    rows, columns = ids_NxS.shape
    is_before_NxS = is_token_NxS & (jnp.arange(columns) < end)[None]
    has_come_NxV = jnp.zeros(scores_NxV.shape, bool)
    has_come_NxV = has_come_NxV.at[jnp.arange(rows)[:, None], ids_NxS].max(is_before_NxS)
    lower_NxV = jnp.where(scores_NxV < 0, scores_NxV * penalty, scores_NxV / penalty)
    return jnp.where(has_come_NxV, lower_NxV, scores_NxV)


def forbid_end(scores_NxV: jax.Array, eos_E: jax.Array, is_too_early: jax.Array) -> jax.Array:
    """-inf on the words that end a row, while it is too early, (N, V).

    Args:
      scores_NxV: of the next tokens.
      eos_E: ids that end a row; -1 is none.
      is_too_early: a bool.
    """
    is_eos_V = (jnp.arange(scores_NxV.shape[-1])[:, None] == eos_E[None]).any(-1)
    return jnp.where((is_eos_V & is_too_early)[None], -jnp.inf, scores_NxV)


def forbid_repeats(
    logits_NxV: jax.Array, ids_NxS: jax.Array, is_token_NxS: jax.Array, end: jax.Array, size: int
) -> jax.Array:
    """-inf on the words that would complete an n-gram for the second time, (N, V).

    Args:
      logits_NxV: of the tokens of column `end`.
      ids_NxS: token ids.
      is_token_NxS: False on padding.
      end: columns from here on are still to come.
      size: tokens an n-gram; above S, nothing is forbidden.
    """
    rows, columns = ids_NxS.shape
    if size > columns:
        return logits_NxV
    start_C = jnp.arange(columns - size + 1)
    is_repeat_NxC = is_token_NxS[:, : columns - size + 1] & (start_C + size <= end)[None]
    for n in range(size - 1):
        latest_Nx1 = jax.lax.dynamic_slice_in_dim(ids_NxS, end - size + 1 + n, 1, axis=1)
        is_repeat_NxC &= ids_NxS[:, n : n + len(start_C)] == latest_Nx1
    last_NxC = ids_NxS[:, size - 1 :]
    is_banned_NxV = jnp.zeros(logits_NxV.shape, bool)
    is_banned_NxV = is_banned_NxV.at[jnp.arange(rows)[:, None], last_NxC].max(is_repeat_NxC)
    return jnp.where(is_banned_NxV, -jnp.inf, logits_NxV)
