"""Generates token by token, greedily or by sampling.

Shapes in names: B rows, N new columns, S columns in all, V words.
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
from lorax.generation.warp import warp
from lorax.models import KVCache

_COPIES = 2**31 - 1  # counted down from here, names of streams are none of a step


class State(NamedTuple):
    """What a step changes.

    Attributes:
      cache: of all columns but the newest.
      ids: prompts, then what is generated, then zeros, (B, S).
      log_prob: the model's, of each new token, (B, N).
      length: new tokens a row, (B,).
      is_done: whether a row has ended, (B,).
      step: new tokens of the longest row.
    """

    cache: KVCache
    ids: jax.Array
    log_prob: jax.Array
    length: jax.Array
    is_done: jax.Array
    step: jax.Array


@partial(jax.jit, static_argnames="program")
def start(program: Program, params: Any, prompts: Prompts, options: Options) -> State:
    """Process the prompts and choose the first tokens."""
    logits_BxV, cache = prefill(program, params, prompts)
    batch, zero = len(prompts.row), jnp.zeros((), jnp.int32)
    state = State(
        cache,
        all_columns(program, prompts)[0],
        jnp.zeros((batch, program.room), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        ~prompts.is_real,
        zero,
    )
    return _pick(program, prompts, options, state, logits_BxV)


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def go_on(
    program: Program,
    params: Any,
    prompts: Prompts,
    options: Options,
    *,
    state: State,
    until: jax.Array,
) -> State:
    """Step until there are `until` new tokens or all rows have ended; `state` is donated."""
    before = prompts.ids.shape[1] - 1

    def step(state: State) -> State:
        column = before + state.step
        token_Bx1 = jax.lax.dynamic_slice_in_dim(state.ids, column, 1, axis=1)
        logits_BxV, cache = forward(program, params, token_Bx1[:, 0], state.cache)
        return _pick(program, prompts, options, state._replace(cache=cache), logits_BxV)

    def is_open(state: State) -> jax.Array:
        return (state.step < until) & ~state.is_done.all()

    return jax.lax.while_loop(is_open, step, state)


def _pick(
    program: Program, prompts: Prompts, options: Options, state: State, logits_BxV: jax.Array
) -> State:
    column = prompts.ids.shape[1] + state.step
    scores_BxV = process(program, prompts, options, logits_BxV, ids_NxS=state.ids, step=state.step)
    token_B = _choose(program, prompts, options, state.step, scores_BxV).astype(jnp.int32)
    token_B = jnp.where(state.is_done, 0, token_B)
    log_prob_BxV = jax.nn.log_softmax(logits_BxV)
    log_prob_Bx1 = jnp.take_along_axis(log_prob_BxV, token_B[:, None], axis=1)
    return State(
        state.cache,
        jax.lax.dynamic_update_slice_in_dim(state.ids, token_B[:, None], column, axis=1),
        jax.lax.dynamic_update_slice_in_dim(state.log_prob, log_prob_Bx1, state.step, axis=1),
        state.length + (~state.is_done).astype(jnp.int32),
        state.is_done | ends(token_B, options, state.step),
        state.step + 1,
    )


def _choose(
    program: Program, prompts: Prompts, options: Options, step: jax.Array, scores_BxV: jax.Array
) -> jax.Array:
    if not program.samples:
        return scores_BxV.argmax(-1)
    if program.cuts:
        scores_BxV = warp(scores_BxV, options.temperature, options.top_k, options.top_p)
    else:
        scores_BxV = scores_BxV / options.temperature

    def draw(row: jax.Array, copy: jax.Array, scores_V: jax.Array) -> jax.Array:
        first = jax.random.fold_in(options.key, row)
        # A prompt's first continuation is the same, however many there are.
        key = jnp.where(copy == 0, first, jax.random.fold_in(first, _COPIES - copy))
        return jax.random.categorical(jax.random.fold_in(key, step), scores_V)

    return jax.vmap(draw)(prompts.row, prompts.copy, scores_BxV)
