"""The packed programs: one optimizer step, or one forward pass, of many trials at once.

Both are module-level jitted functions, as in `lorax.train.step`. State, scales, hyperparameters
and batches have a leading axis of K lanes; the frozen base has none, and is shared.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from lorax.train.optimizer import Hyper
from lorax.train.step import Batch, Frozen, Program, State, forward, optimizer_step


def over_lanes(step: Callable[[Any], Any], lanes: Any, side_by_side: int) -> Any:
    """`step` of every lane, `side_by_side` of them vectorised, the batches of them in sequence.

    Few lanes side by side keep temporaries small, which is what a CPU's caches want; an
    accelerator wants as many as its memory holds. The numbers are the same.

    Args:
      step: from one lane's arrays to its results.
      lanes: a pytree whose leaves have a leading axis of K lanes.
      side_by_side: at least 1.
    """
    count = jax.tree.leaves(lanes)[0].shape[0]
    if side_by_side >= count:
        return jax.vmap(step)(lanes)
    return jax.lax.map(step, lanes, batch_size=side_by_side)


class Packed(NamedTuple):
    """The static part of a pack: what its lanes have in common, and see `over_lanes`."""

    program: Program
    side_by_side: int


@partial(jax.jit, static_argnames="packed", donate_argnames="state")
def packed_step(
    packed: Packed, state: State, frozen: Frozen, hyper: Hyper, batch: Batch
) -> tuple[State, jax.Array]:
    """One optimizer step of each lane: (new states, mean losses (K,)).

    Args:
      packed: the static part.
      state: stacked, (K, ...); donated.
      frozen: parameters without a lane axis; each target's scale, (K,), 0 where a lane does not
        adapt it.
      hyper: (K,) each.
      batch: (K, B, T) and (K, B).
    """

    def step(lane: tuple[Any, ...]) -> tuple[State, jax.Array]:
        state, scales, hyper, batch = lane
        return optimizer_step(packed.program, state, frozen._replace(scales=scales), hyper, batch)

    return over_lanes(step, (state, frozen.scales, hyper, batch), packed.side_by_side)


@partial(jax.jit, static_argnames="packed")
def packed_predict(packed: Packed, trainable: Any, frozen: Frozen, batch: Batch) -> jax.Array:
    """Each lane's outputs for the same batch: (K, B, outputs)."""

    def predict(lane: tuple[Any, Any]) -> jax.Array:
        trainable, scales = lane
        return forward(packed.program, trainable, frozen._replace(scales=scales), batch)

    return over_lanes(predict, (trainable, frozen.scales), packed.side_by_side)
