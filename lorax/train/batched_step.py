"""The packed programs: one optimizer step, or one forward pass, of many trials at once.

State, scales, hyperparameters and batches have a leading axis of K lanes. The frozen base has
none and is shared. On a mesh the lanes are sharded over its `trial` axis.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lorax.train.indexed_batch import IndexedBatch, in_rows
from lorax.train.mesh import jit_lanes, map_lanes
from lorax.train.optimizer import Hyper
from lorax.train.step import AnyBatch, Batch, Frozen, Program, State, forward, optimizer_step


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
      where a lane does not adapt a target; hyper is (K,) each; the batch has leaves (K, ...), or
      examples and starts (K, ...) of a split that all lanes share.
    """

    def step(
        state: State, frozen: Frozen, hyper: Hyper, batch: AnyBatch
    ) -> tuple[State, jax.Array]:
        shared_batch, own_batch, whole = _parts(batch)

        def one(shared: tuple[Any, Any], lane: tuple[Any, ...]) -> tuple[State, jax.Array]:
            params, split = shared
            state, scales, hyper, own = lane
            frozen = Frozen(params, scales)
            return optimizer_step(packed.program, state, frozen, hyper, whole(split, own))

        shared, lanes = (frozen.params, shared_batch), (state, frozen.scales, hyper, own_batch)
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

    def predict(trainable: Any, frozen: Frozen, batch: AnyBatch) -> jax.Array:
        shared, lanes = (frozen.params, in_rows(batch)), (trainable, frozen.scales)
        return map_lanes(one, shared, lanes, mesh=packed.mesh, chunk=packed.side_by_side)

    return jit_lanes(predict, packed.mesh)


def _parts(batch: AnyBatch) -> tuple[Any, Any, Callable[[Any, Any], AnyBatch]]:
    """(the part of a batch that lanes share, the part of each lane, a function to join them)."""
    if not isinstance(batch, IndexedBatch):
        return None, batch, lambda _, own: own
    shape = batch.shape
    own = batch.examples, batch.starts
    return batch.split, own, lambda split, own: IndexedBatch(split, own[0], own[1], shape)
