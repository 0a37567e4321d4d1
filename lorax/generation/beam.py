"""Beam search, by the rules of Hugging Face transformers.

Shapes in names: B rows, K beams, M = B * K, C candidates, S columns, V words, E ids that end.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax.generation.program import (
    Options,
    Program,
    Prompts,
    all_columns,
    ends,
    prefill,
    process,
)
from lorax.generation.program import next_logits as forward
from lorax.models import KVCache

_NEVER = -1e9  # added to the score of candidates that must not be chosen


class Ended(NamedTuple):
    """The best hypotheses that have ended, the best first; slots are empty at first.

    Attributes:
      ids: (B, K, S).
      score: log-probability / length ** length_penalty, (B, K).
      log_prob: of the new tokens together, (B, K).
      length: new tokens, (B, K).
      is_full: False in an empty slot, (B, K).
    """

    ids: jax.Array
    score: jax.Array
    log_prob: jax.Array
    length: jax.Array
    is_full: jax.Array


class State(NamedTuple):
    """What a step changes.

    Attributes:
      cache: of all columns but the newest, of B * K rows.
      ids: of the open hypotheses, the best first, (B, K, S).
      log_prob: of their new tokens together, (B, K).
      ended: the others.
      is_open: whether a row's ended hypotheses may still change, (B,).
      step: new tokens.
    """

    cache: KVCache
    ids: jax.Array
    log_prob: jax.Array
    ended: Ended
    is_open: jax.Array
    step: jax.Array


class Candidates(NamedTuple):
    """Extensions of a row's open hypotheses by a token, the best first.

    Attributes:
      ids: (B, C, S).
      log_prob: of the new tokens together, (B, C).
      beam: the open hypothesis that each extends, (B, C).
      ends: whether it ends with this token, (B, C).
    """

    ids: jax.Array
    log_prob: jax.Array
    beam: jax.Array
    ends: jax.Array


@partial(jax.jit, static_argnames="program")
def search(program: Program, params: Any, prompts: Prompts, options: Options) -> Ended:
    """The ended hypotheses of every row.

    Each step extends all open hypotheses by all words. Of the best extensions those that end and
    are among the first K are candidates for the ended hypotheses, and the best K that do not end
    stay open.
    """
    logits_BxV, cache = prefill(program, params, prompts)
    K = program.num_beams
    spread = partial(jnp.repeat, repeats=K, axis=0)  # a row's beams are neighbours
    keys, values, mask = jax.tree.map(spread, cache[:3])
    cache = KVCache(keys, values, mask, cache.next)
    state = _extend(program, prompts, options, _first(program, prompts, cache), spread(logits_BxV))
    before = prompts.ids.shape[1] - 1

    def step(state: State) -> State:
        token_BxKx1 = jax.lax.dynamic_slice_in_dim(state.ids, before + state.step, 1, axis=2)
        logits_MxV, cache = forward(program, params, token_BxKx1.reshape(-1), state.cache)
        return _extend(program, prompts, options, state._replace(cache=cache), logits_MxV)

    def is_open(state: State) -> jax.Array:
        return (state.step < options.limit) & state.is_open.any()

    return jax.lax.while_loop(is_open, step, state).ended


def _first(program: Program, prompts: Prompts, cache: KVCache) -> State:
    K = program.num_beams
    ids_BxS, _ = all_columns(program, prompts)
    ids_BxKxS = jnp.repeat(ids_BxS[:, None], K, axis=1)
    shape = ids_BxKxS.shape[:2]
    zeros_BxK = jnp.zeros(shape, jnp.float32)
    never_BxK = jnp.full(shape, -jnp.inf, jnp.float32)
    ended = Ended(
        ids_BxKxS, never_BxK, zeros_BxK, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    )
    # All beams of a row are the same prompt: the first alone is extended.
    log_prob_BxK = zeros_BxK.at[:, 1:].set(_NEVER)
    return State(cache, ids_BxKxS, log_prob_BxK, ended, prompts.is_real, jnp.zeros((), jnp.int32))


def _extend(
    program: Program, prompts: Prompts, options: Options, state: State, logits_MxV: jax.Array
) -> State:
    found = _candidates(program, prompts, options, state, logits_MxV)
    ended = _ended(program, options, state, found)
    open_BxC = found.log_prob + jnp.where(found.ends, _NEVER, 0.0)
    log_prob_BxK, order_BxK = jax.lax.top_k(open_BxC, program.num_beams)
    length = state.step + 1
    return State(
        _reordered(state.cache, _take(found.beam, order_BxK)),
        _take(found.ids, order_BxK),
        log_prob_BxK,
        ended,
        state.is_open & _can_improve(options, log_prob_BxK[:, 0], ended, length),
        length,
    )


def _candidates(
    program: Program, prompts: Prompts, options: Options, state: State, logits_MxV: jax.Array
) -> Candidates:
    B, K, S = state.ids.shape
    words, column = logits_MxV.shape[-1], prompts.ids.shape[1] + state.step
    log_prob_MxV = jax.nn.log_softmax(logits_MxV)
    ids_MxS = state.ids.reshape(B * K, S)
    log_prob_MxV = process(
        program, prompts, options, log_prob_MxV, ids_NxS=ids_MxS, step=state.step
    )
    log_prob_BxKxV = state.log_prob[:, :, None] + log_prob_MxV.reshape(B, K, words)
    # An open hypothesis can end by each of E tokens: K candidates are left that do not.
    kept = max(2, 1 + options.eos.size) * K
    log_prob_BxC, place_BxC = jax.lax.top_k(log_prob_BxKxV.reshape(B, K * words), kept)
    beam_BxC, token_BxC = place_BxC // words, place_BxC % words
    ids_BxCxS = _take(state.ids, beam_BxC).at[:, :, column].set(token_BxC)
    return Candidates(ids_BxCxS, log_prob_BxC, beam_BxC, ends(token_BxC, options, state.step))


def _ended(program: Program, options: Options, state: State, found: Candidates) -> Ended:
    """The best of the earlier ended hypotheses and of those among the first K that end now."""
    length = state.step + 1
    is_first_1xC = (jnp.arange(found.ends.shape[1]) < program.num_beams)[None]
    can_end_BxC = found.ends & is_first_1xC & state.is_open[:, None]
    score_BxC = found.log_prob / length.astype(jnp.float32) ** options.length_penalty
    score_BxC = jnp.where(can_end_BxC, score_BxC, -jnp.inf)
    length_BxC = jnp.full(score_BxC.shape, length)
    more = Ended(found.ids, score_BxC, found.log_prob, length_BxC, can_end_BxC)
    merged = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.ended, more)
    # Any real score, even -inf, ranks before an empty slot.
    order_BxK = jnp.lexsort((-merged.score, ~merged.is_full))[:, : program.num_beams]
    return jax.tree.map(lambda x: _take(x, order_BxK), merged)


def _can_improve(
    options: Options, log_prob_B: jax.Array, ended: Ended, length: jax.Array
) -> jax.Array:
    """(B,): whether the best open hypothesis may still enter a row's ended ones."""
    is_longest = options.is_never & (options.length_penalty > 0)
    at = jnp.where(is_longest, options.limit, length).astype(jnp.float32)
    would_enter_B = log_prob_B / at**options.length_penalty > ended.score.min(1)
    is_full_B = ended.is_full.all(1)
    return ~is_full_B | (would_enter_B & ~options.is_early)


def _take(x_BxN: jax.Array, index_BxM: jax.Array) -> jax.Array:
    """(B, N, ...) -> (B, M, ...)."""
    rows_Bx1 = jnp.arange(len(x_BxN))[:, None]
    return x_BxN[rows_Bx1, index_BxM]


def _reordered(cache: KVCache, beam_BxK: jax.Array) -> KVCache:
    """The cache of the beams that the open hypotheses extend; a row's beams share a mask."""
    B, K = beam_BxK.shape
    row_M = (jnp.arange(B)[:, None] * K + beam_BxK).reshape(-1)
    keys, values = jax.tree.map(lambda x: x[row_M], (cache.keys, cache.values))
    return KVCache(keys, values, cache.mask, cache.next)
