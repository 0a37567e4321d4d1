"""The packed programs: one optimizer step, or one forward pass, of many trials at once.

State, scales, hyperparameters and batches have a leading axis of K lanes. The frozen base has
none and is shared. On a mesh the lanes are sharded over its `trial` axis.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lorax.train.indexed_batch import IndexedBatch, expand
from lorax.train.mesh import jit_lanes, map_lanes
from lorax.train.optimizer import Hyper
from lorax.train.step import Batch, Frozen, Program, State, forward, optimizer_step


class Packed(NamedTuple):
    """The static part of a pack.

    Few lanes side by side keep temporaries small enough for a CPU's caches; an accelerator is
    fastest with as many as its memory holds. The numbers are the same.

    Attributes:
      program: the static part that its lanes share.
      side_by_side: lanes that a device vectorises; it computes the parts one after another.
      mesh: where they run; None is one device.
    """

    program: Program
    side_by_side: int
    mesh: Mesh | None = None


@cache
def batched_step(packed: Packed) -> Any:
    """One optimizer step of each lane, compiled.

    Returns:
      (state, frozen, hyper, batch) -> (new states, mean losses (K,)). States are stacked,
      (K, ...), and donated; `frozen` has parameters without a lane axis, and scales (K,), 0
      where a lane does not adapt a target; hyper is (K,) each; the batch has examples and
      starts (K, ...) of a split that all lanes share.
    """

    def step(
        state: State, frozen: Frozen, hyper: Hyper, batch: IndexedBatch
    ) -> tuple[State, jax.Array]:
        def one(shared: tuple[Any, Any], lane: tuple[Any, ...]) -> tuple[State, jax.Array]:
            params, split = shared
            state, scales, hyper, examples, starts = lane
            own = IndexedBatch(split, examples, starts, batch.shape)
            return optimizer_step(packed.program, state, Frozen(params, scales), hyper, own)

        shared = frozen.params, batch.split
        lanes = state, frozen.scales, hyper, batch.examples, batch.starts
        return map_lanes(one, shared, lanes, mesh=packed.mesh, chunk=packed.side_by_side)

    return jit_lanes(step, packed.mesh, donate_argnums=0)


@cache
def batched_predict(packed: Packed) -> Any:
    """The outputs of each lane for the same batch, compiled.

    Returns:
      (trainable, frozen, batch) -> outputs (K, B, outputs); the batch has no lane axis.
    """

    def one(shared: tuple[Any, Batch], lane: tuple[Any, Any]) -> jax.Array:
        params, batch = shared
        trainable, scales = lane
        return forward(packed.program, trainable, Frozen(params, scales), batch)

    def predict(trainable: Any, frozen: Frozen, batch: IndexedBatch) -> jax.Array:
        shared, lanes = (frozen.params, expand(batch)), (trainable, frozen.scales)
        return map_lanes(one, shared, lanes, mesh=packed.mesh, chunk=packed.side_by_side)

    return jit_lanes(predict, packed.mesh)
