"""Runs the compiled programs on a batch of prompts and returns Python numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.generation import beam, sample
from lorax.generation.program import Options, Program, Prompts
from lorax.generation.text import Stops

STOP_EVERY = 16  # steps between two searches for stop texts


class Made(NamedTuple):
    """The continuation of a prompt.

    Attributes:
      ids: new tokens.
      log_prob: the model's, of them together.
      is_stopped: a stop text is whole with the last of them.
    """

    ids: list[int]
    log_prob: float
    is_stopped: bool = False


def search(
    program: Program, params: Any, batch: Prompts, options: Options, count: int
) -> list[list[Made]]:
    """The `count` best hypotheses of a beam search for each real row, the best first."""
    found = jax.tree.map(np.asarray, beam.search(program, params, batch, options))
    ids_BxKxN = found.ids[:, :, batch.ids.shape[1] :]

    def made(row: int, n: int) -> Made:
        length = found.length[row, n]
        return Made(ids_BxKxN[row, n, :length].tolist(), float(found.log_prob[row, n]))

    return [[made(row, n) for n in range(count)] for row in range(int(batch.is_real.sum()))]


def draw(
    program: Program,
    params: Any,
    batch: Prompts,
    options: Options,
    *,
    stops: Stops,
    prompts: list[list[int]],
) -> list[Made]:
    """A continuation of each real row, token by token.

    With stop texts the program pauses every `STOP_EVERY` steps for a look at the rows' texts; a
    row has a few tokens too many by then, which are dropped.
    """
    state = sample.start(program, params, batch, options)
    limit, real = int(options.limit), int(batch.is_real.sum())
    own = [prompts[n] for n in batch.row[:real].tolist()]
    every = STOP_EVERY if stops.texts else limit
    for step in range(every, limit + every, every):
        until = jnp.int32(min(step, limit))
        state = sample.go_on(program, params, batch, options, state=state, until=until)
        is_stopped = [stops.are_in(*row) for row in zip(own, _new_ids(batch, state), strict=False)]
        is_done_B = np.array(state.is_done)
        is_done_B[:real] |= is_stopped
        if is_done_B.all():
            break
        state = state._replace(is_done=jnp.asarray(is_done_B))
    log_prob_BxN = np.asarray(state.log_prob, np.float64)
    made = []
    for prompt, ids, log_prob_N in zip(own, _new_ids(batch, state), log_prob_BxN, strict=False):
        count = stops.tokens_to(prompt, ids)
        kept = ids[:count]
        log_prob = float(log_prob_N[: len(kept)].sum())
        made.append(Made(kept, log_prob, count is not None))
    return made


def _new_ids(batch: Prompts, state: sample.State) -> list[list[int]]:
    ids_BxN = np.asarray(state.ids)[:, batch.ids.shape[1] :]
    lengths = np.asarray(state.length)
    return [ids_N[:length].tolist() for ids_N, length in zip(ids_BxN, lengths, strict=True)]
