"""The shared parts of generation's programs: static part, data, and calls of the model.

Shapes in names: B rows, P columns of the prompts, S columns in all (prompts, then what is
generated), V words, E ids that end a row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.generation.warp import forbid_end, forbid_repeats, penalize_repeats
from lorax.models import KVCache


@dataclass(frozen=True)
class Program:
    """The static part: calls that differ in data only share a compiled program.

    Attributes:
      graphdef: of the NNX model.
      room: columns for generated tokens, as many as the limit or more.
      num_beams: of a search.
      samples: tokens are drawn, not the most probable taken.
      cuts: and from a part of the words, by top-k or top-p.
      ngram: size of n-grams that may not come twice; 0: all may.
      penalizes: words that came before have other scores.
    """

    graphdef: Any
    room: int
    num_beams: int = 1
    samples: bool = False
    cuts: bool = False
    ngram: int = 0
    penalizes: bool = False


class Options(NamedTuple):
    """The data part, scalars but for `eos`, (E,); see `GenerationConfig`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    length_penalty: jax.Array
    is_early: jax.Array
    is_never: jax.Array
    limit: jax.Array
    least: jax.Array
    repetition_penalty: jax.Array
    eos: jax.Array
    key: jax.Array


class Prompts(NamedTuple):
    """A batch of prompts, padded on the left.

    Attributes:
      ids: token ids, (B, P).
      mask: 0 on padding, 1 elsewhere, (B, P).
      row: the place of each row's prompt among all prompts, (B,).
      copy: which of the prompt's continuations a row is, from 0, (B,); with `row` it names the
        row's stream of random numbers.
      is_real: False in rows that fill the batch, (B,).
    """

    ids: jax.Array
    mask: jax.Array
    row: jax.Array
    copy: jax.Array
    is_real: jax.Array


def prefill(program: Program, params: Any, prompts: Prompts) -> tuple[jax.Array, KVCache]:
    """Logits of the first new tokens, (B, V), and a cache with room for all."""
    model = nnx.merge(program.graphdef, params)
    batch, length = prompts.ids.shape
    cache = KVCache.empty(model.config, batch, length + program.room, model.decoder.dtype)
    logits_BxTxV, cache = model(prompts.ids, prompts.mask, cache=cache, only_last=True)
    return logits_BxTxV[:, -1], cache


def next_logits(
    program: Program, params: Any, token_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Logits of the tokens after these, (B, V), and the cache with these."""
    model = nnx.merge(program.graphdef, params)
    logits_BxTxV, cache = model(token_B[:, None], jnp.ones_like(token_B)[:, None], cache=cache)
    return logits_BxTxV[:, -1], cache


def all_columns(program: Program, prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    """Ids of the prompts with room for what is generated, and where padding is not: (B, S)."""
    padding = (0, 0), (0, program.room)
    is_token_BxS = jnp.pad(prompts.mask != 0, padding, constant_values=True)
    return jnp.pad(prompts.ids, padding), is_token_BxS


def process(
    program: Program,
    prompts: Prompts,
    options: Options,
    scores_NxV: jax.Array,
    *,
    ids_NxS: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """Scores after what penalizes and forbids words, in transformers' order, (N, V).

    Args:
      program: of the N rows of B prompts, N / B neighbours each.
      prompts: B of them.
      options: the data part.
      scores_NxV: logits, or log-probabilities in a search.
      ids_NxS: of all columns.
      step: new tokens so far.
    """
    column = prompts.ids.shape[1] + step
    if program.penalizes or program.ngram:
        is_token_BxS = all_columns(program, prompts)[1]
        is_token_NxS = jnp.repeat(is_token_BxS, len(ids_NxS) // len(is_token_BxS), axis=0)
        before = ids_NxS, is_token_NxS, column
        if program.penalizes:
            scores_NxV = penalize_repeats(scores_NxV, *before, options.repetition_penalty)
        if program.ngram:
            scores_NxV = forbid_repeats(scores_NxV, *before, program.ngram)
    return forbid_end(scores_NxV, options.eos, step < options.least)


def ends(token: jax.Array, options: Options, step: jax.Array) -> jax.Array:
    """Whether rows end with these tokens, their `step`-th from 0; the shape stays."""
    is_eos = (token[..., None] == options.eos.reshape((1,) * token.ndim + (-1,))).any(-1)
    return is_eos | (step + 1 >= options.limit)
