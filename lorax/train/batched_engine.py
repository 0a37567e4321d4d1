"""The engine of a pack: one program steps the stacked states of many trials."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lora import stack, union, unstack
from lorax.runtime.compiler import StepCost, compile_cost, shapes_of
from lorax.train.batched_step import Packed, batched_predict, batched_step
from lorax.train.indexed_batch import BatchShape, IndexedBatch
from lorax.train.mesh import (
    make_mesh,
    padded,
    replicate,
    shard_base,
    shard_lanes,
    to_host,
)
from lorax.train.optimizer import Hyper
from lorax.train.setup import Setup
from lorax.train.step import Frozen, State


class BatchedEngine:
    """Trains K trials of one program in lockstep over one frozen base.

    Args:
      setups: of the trials, in the order of the lanes; their bases are the same arrays.
      states: the state of each trial, in its own shapes.
      tokens_at_once: number of tokens that the lanes side by side have together.
      lanes: number of lanes side by side, whatever their tokens.
      mesh: the devices; None for one.

    Attributes:
      state: stacked, ranks and targets zero-padded; donated to every step.
      side: lanes that a device computes side by side in the latest step.
    """

    def __init__(
        self,
        setups: Sequence[Setup],
        states: Sequence[State],
        *,
        tokens_at_once: int,
        lanes: int | None = None,
        mesh: Mesh | None = None,
    ):
        frozen_layers = min(setup.program.frozen_layers for setup in setups)
        self.program = dataclasses.replace(setups[0].program, frozen_layers=frozen_layers)
        self.mesh, self.side = mesh, 1
        self.tokens_at_once, self.lanes = tokens_at_once, lanes
        self._shapes = [jax.tree.map(_shape, state) for state in states]
        self._programs: dict[tuple[int, BatchShape], tuple[StepCost, Any, int]] = {}
        like = stacked_like(self._shapes)
        adapter = jax.tree.map(lambda _: None, like.trainable["lora"])
        params = {"base": setups[0].frozen.params["base"], "lora": adapter}
        scales = {
            path: np.asarray([s.frozen.scales.get(path, 0.0) for s in setups], np.float32)
            for path in like.trainable["lora"]
        }
        self._params = shard_base(params, mesh) if mesh else params
        self._place(stack(states, like), scales)

    def _place(self, state: Any, scales: Any) -> None:
        self.state: State = self._lanes(state)
        self.frozen = Frozen(self._params, self._lanes(scales))

    def _lanes(self, tree: Any) -> Any:
        return shard_lanes(tree, self.mesh) if self.mesh else jax.tree.map(jnp.asarray, tree)

    def _host(self, tree: Any) -> Any:
        return to_host(tree, self.count) if self.mesh else jax.tree.map(np.asarray, tree)

    @property
    def count(self) -> int:
        """Lanes K."""
        return len(self._shapes)

    @property
    def costs(self) -> list[StepCost]:
        """Of every program compiled so far."""
        return [cost for cost, *_ in self._programs.values()]

    def compile(
        self, hyper: Hyper, batch: IndexedBatch, *, is_trained: bool = True
    ) -> tuple[StepCost, bool]:
        """See `lorax.train.engine.Engine`; `is_trained` as in `compile_cost`."""
        key = self._key(batch)
        is_new = key not in self._programs
        if is_new:
            cost, program = self.compilation(hyper, batch, is_trained=is_trained)()
            self._programs[key] = cost, program, self._packed(batch).side_by_side
        cost, _, self.side = self._programs[key]
        return cost, is_new

    def compilation(
        self, hyper: Hyper, batch: IndexedBatch, *, is_trained: bool = False
    ) -> Callable[[], tuple[StepCost, Any]]:
        """See `lorax.train.engine.Engine`; `is_trained` as in `compile_cost`."""
        packed, arguments = self._packed(batch), self._arguments(hyper, batch)
        return partial(
            compile_cost,
            batched_step(packed),
            *(arguments if self.mesh else shapes_of(arguments)),
            lanes=_counted(self._lanes_a_device, packed.side_by_side) / self._row_devices,
            is_trained=is_trained,
            keeps_barriers=packed.program.saves_memory,
        )

    def step(self, hyper: Hyper, batch: IndexedBatch) -> jax.Array:
        """See `lorax.train.engine.Engine`."""
        self.compile(hyper, batch)
        program = self._programs[self._key(batch)][1]
        self.state, losses = program(*self._arguments(hyper, batch))
        return losses

    def read(self, losses: jax.Array) -> np.ndarray:
        """See `lorax.train.engine.Engine`."""
        return self._host(losses)

    def predict(self, batch: IndexedBatch) -> Any:
        """See `lorax.train.engine.Engine`."""
        program = batched_predict(self._packed(batch))
        if self.mesh:
            batch = self._put(batch, replicate)
        outputs = program(self.state.trainable, self.frozen, batch)
        return self._host(outputs) if self.mesh else outputs

    def trainable(self, run: int) -> Any:
        """See `lorax.train.engine.Engine`."""
        return unstack(self._host(self.state.trainable), run, self._shapes[run].trainable)

    def host_state(self) -> State:
        """All lanes' states, stacked, on the host."""
        return self._host(self.state)

    def state_of(self, lane: int) -> State:
        """A lane's whole state, on the host, in its own shapes."""
        return unstack(self.host_state(), lane, self._shapes[lane])

    def stack_trainables(self, trees: Sequence[Any]) -> Any:
        """The lanes' trainable parts, stacked as in a checkpoint of the pack."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.state)
        return stack(trees, like.trainable)

    def keep(self, lanes: Sequence[int]) -> None:
        """Keep only these lanes, in this order; the next step compiles a smaller program."""
        both = self._host((self.state, self.frozen.scales))
        self._shapes = [self._shapes[n] for n in lanes]
        self._place(*jax.tree.map(lambda x: x[np.asarray(lanes)], both))

    def _key(self, batch: IndexedBatch) -> tuple[int, BatchShape]:
        return (self.count, batch.shape)

    def _arguments(self, hyper: Hyper, batch: IndexedBatch) -> tuple[Any, ...]:
        if self.mesh:
            hyper, batch = self._lanes(hyper), self._put(batch, shard_lanes)
        return self.state, self.frozen, hyper, batch

    def _put(self, batch: IndexedBatch, put: Callable[[Any, Any], Any]) -> IndexedBatch:
        """A batch on the mesh; its split is there already."""
        examples, starts = put((batch.examples, batch.starts), self.mesh)
        return dataclasses.replace(batch, examples=examples, starts=starts)

    @property
    def _lanes_a_device(self) -> int:
        if self.mesh is None:
            return self.count
        return padded(self.count, self.mesh) // self.mesh.shape["trial"]

    @property
    def _row_devices(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1

    def _packed(self, batch: IndexedBatch) -> Packed:
        wanted = self.lanes or self.tokens_at_once // batch.shape.tokens
        return Packed(self.program, even_share(self._lanes_a_device, wanted), self.mesh)


def stacked_like(states: Sequence[Any]) -> State:
    """Shapes of one lane that fit each of the states: every target, at its largest rank."""

    def widest(trees: Sequence[Any]) -> Any:
        return {"base": trees[0]["base"], "lora": union([tree["lora"] for tree in trees])}

    trainables = [state.trainable for state in states]
    like = widest(trainables)
    first: Any = jax.tree.structure(trainables[0])

    def is_trainable(node: Any) -> bool:
        return bool(first == jax.tree.structure(node))

    # Adam's moments are trees like the trainable part: each gets its widened shapes.
    opt_state = jax.tree.map(
        lambda node: like if is_trainable(node) else node,
        states[0].opt_state,
        is_leaf=is_trainable,
    )
    return states[0]._replace(trainable=like, opt_state=opt_state)


def mesh_of(trial: TrialConfig) -> Mesh | None:
    """The mesh of a trial's sweep; None on a single device.

    Raises:
      LoraxError: sizes do not match the number of devices, or do not divide the batches.
    """
    sizes = trial.sweep.mesh
    if jax.device_count() == 1 and (sizes.trial or 1) == sizes.data == sizes.fsdp == 1:
        return None
    mesh = make_mesh(sizes.trial, sizes.data, sizes.fsdp)
    devices, train = sizes.data * sizes.fsdp, trial.train
    if (examples := train.batch_size // train.grad_accum) % devices:
        raise LoraxError(
            f"train.batch_size / train.grad_accum = {examples} does not divide over "
            f"sweep.mesh.data={sizes.data} x sweep.mesh.fsdp={sizes.fsdp}"
        )
    return mesh


def trains_alone(trials: Sequence[TrialConfig]) -> bool:
    """Whether a pack needs no lanes: it has a single trial, and no mesh that could speed it up."""
    trial = trials[0]
    return len(trials) == 1 and (trial.train.mode == "full" or mesh_of(trial) is None)


def even_share(count: int, wanted: int) -> int:
    """Number of the `count` lanes to compute side by side: near `wanted`, preferably a divisor.

    >>> [even_share(12, wanted) for wanted in (0, 1, 5, 7, 99)]
    [1, 1, 4, 6, 12]
    >>> even_share(7, 4)
    4
    """
    wanted = max(1, min(wanted, count))
    divisors = [n for n in range(1, wanted + 1) if count % n == 0]
    return divisors[-1] if 2 * divisors[-1] > wanted else wanted


def _counted(count: int, side: int) -> int:
    """Number of lanes whose FLOPs XLA counts: a loop's body once, and the remainder."""
    return count if side >= count else side + count % side


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
