"""The interface between the training loop and the programs that compute its steps."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lorax.runtime.compiler import StepCost
from lorax.train.indexed_batch import IndexedBatch
from lorax.train.optimizer import Hyper
from lorax.train.step import Program


class Engine(Protocol):
    """Trains K runs in lockstep, in the loop's order.

    Attributes:
      program: the static part that the runs share.
      mesh: where they train; None is one device.
    """

    program: Program
    mesh: Mesh | None

    def compile(self, hyper: Hyper, batch: IndexedBatch) -> tuple[StepCost, bool]:
        """(cost of the step for this batch shape, whether this call has compiled it)."""

    def compilation(self, hyper: Hyper, batch: IndexedBatch) -> Callable[[], Any]:
        """A function that compiles the step for this batch shape, from any thread."""

    def step(self, hyper: Hyper, batch: IndexedBatch) -> jax.Array:
        """Start one optimizer step of each run; return the losses (K,) without waiting.

        Args:
          hyper: (K,) each.
          batch: leaves (K, ...).
        """

    def read(self, losses: jax.Array) -> np.ndarray:
        """Wait for the losses of `step`: (K,)."""

    def predict(self, batch: IndexedBatch) -> Any:
        """Outputs of each run for one batch, which has no run axis: (K, N, outputs)."""

    def trainable(self, run: int) -> Any:
        """A run's trainable part, on the host, in its own shapes."""
