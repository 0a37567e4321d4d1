"""What computes the steps of the loop's lanes: here one trial's own program."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lorax.runtime.compiler import StepCost, compile_cost
from lorax.train.optimizer import Hyper
from lorax.train.setup import Setup
from lorax.train.step import State, predict, train_step

HostBatch = dict[str, np.ndarray]


class Engine(Protocol):
    """Trains K lanes in lockstep; their order is the loop's."""

    def compile(
        self, hypers: Sequence[Hyper], batches: Sequence[HostBatch]
    ) -> tuple[StepCost, bool]:
        """(the cost of the step for this batch shape, whether it was compiled just now)."""

    def step(self, hypers: Sequence[Hyper], batches: Sequence[HostBatch]) -> jax.Array:
        """One optimizer step of each lane: their losses, K in number, not waited for."""

    def read(self, losses: jax.Array) -> np.ndarray:
        """The losses of `step`, waited for: (K,)."""

    def predict(self, batch: HostBatch) -> Any:
        """Outputs of each lane for the same batch: (K, B, outputs)."""

    def trainable(self, lane: int) -> Any:
        """What a lane trains, on the host, in its own shapes."""


class SingleEngine:
    """One trial through `train_step`: a lane by itself.

    Attributes:
      state: donated to every step, so it is replaced, never shared.
    """

    def __init__(self, setup: Setup, state: State):
        self.setup = setup
        # The step donates its state, and the frozen side may share arrays with it.
        self.state: State = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)
        self._programs: dict[tuple[int, ...], tuple[StepCost, Any]] = {}

    def compile(
        self, hypers: Sequence[Hyper], batches: Sequence[HostBatch]
    ) -> tuple[StepCost, bool]:
        """See `Engine`."""
        shape = batches[0]["input_ids"].shape
        is_new = shape not in self._programs
        if is_new:
            arguments = self._arguments(hypers, batches)
            program = self.setup.program
            self._programs[shape] = compile_cost(
                train_step, program, *arguments, keeps_barriers=program.saves_memory
            )
        return self._programs[shape][0], is_new

    def step(self, hypers: Sequence[Hyper], batches: Sequence[HostBatch]) -> jax.Array:
        """See `Engine`."""
        self.compile(hypers, batches)
        program = self._programs[batches[0]["input_ids"].shape][1]
        self.state, loss = program(*self._arguments(hypers, batches))
        return loss

    def read(self, losses: jax.Array) -> np.ndarray:
        """See `Engine`."""
        return np.ravel(np.asarray(losses))

    def predict(self, batch: HostBatch) -> jax.Array:
        """See `Engine`."""
        setup = self.setup
        return predict(setup.program, self.state.trainable, setup.frozen, batch)[None]

    def trainable(self, lane: int) -> Any:
        """See `Engine`."""
        del lane
        return jax.tree.map(np.asarray, self.state.trainable)

    def _arguments(self, hypers: Sequence[Hyper], batches: Sequence[HostBatch]) -> tuple[Any, ...]:
        return self.state, self.setup.frozen, hypers[0], batches[0]
