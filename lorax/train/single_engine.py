"""The engine of one trial."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax.runtime.compiler import StepCost, compile_cost, shapes_of
from lorax.train.indexed_batch import BatchShape, IndexedBatch
from lorax.train.optimizer import Hyper
from lorax.train.setup import Setup
from lorax.train.step import State, predict, train_step


class SingleEngine:
    """One trial through `train_step`; see `lorax.train.engine.Engine`.

    Attributes:
      state: donated to every step; each step replaces it, so it must not be shared.
    """

    mesh: Mesh | None = None

    def __init__(self, setup: Setup, state: State):
        self.setup, self.program = setup, setup.program
        # The step donates its state, and the frozen side may share arrays with it.
        self.state: State = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)
        self._programs: dict[BatchShape, tuple[StepCost, Any]] = {}

    def compile(self, hyper: Hyper, batch: IndexedBatch) -> tuple[StepCost, bool]:
        """See `Engine`."""
        shape = batch.shape
        is_new = shape not in self._programs
        if is_new:
            self._programs[shape] = self.compilation(hyper, batch, is_trained=True)()
        return self._programs[shape][0], is_new

    def compilation(
        self, hyper: Hyper, batch: IndexedBatch, *, is_trained: bool = False
    ) -> Callable[[], tuple[StepCost, Any]]:
        """See `Engine`; `is_trained` as in `compile_cost`."""
        program, arguments = self.program, shapes_of(self._arguments(hyper, batch))
        return partial(
            compile_cost,
            train_step,
            program,
            *arguments,
            is_trained=is_trained,
            keeps_barriers=program.saves_memory,
        )

    def step(self, hyper: Hyper, batch: IndexedBatch) -> jax.Array:
        """See `Engine`."""
        self.compile(hyper, batch)
        program = self._programs[batch.shape][1]
        self.state, loss = program(*self._arguments(hyper, batch))
        return loss

    def read(self, losses: jax.Array) -> np.ndarray:
        """See `Engine`."""
        return np.ravel(np.asarray(losses))

    def predict(self, batch: IndexedBatch) -> jax.Array:
        """See `Engine`."""
        setup = self.setup
        return predict(setup.program, self.state.trainable, setup.frozen, batch)[None]

    def trainable(self, run: int) -> Any:
        """See `Engine`."""
        del run
        return jax.tree.map(np.asarray, self.state.trainable)

    def _arguments(self, hyper: Hyper, batch: IndexedBatch) -> tuple[Any, ...]:
        own = Hyper(*(values[0] for values in hyper))
        batch = replace(batch, examples=batch.examples[0], starts=batch.starts[0])
        return self.state, self.setup.frozen, own, batch
