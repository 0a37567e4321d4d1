"""What computes the steps of the loop's runs."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lorax.runtime.compiler import StepCost
from lorax.train.optimizer import Hyper
from lorax.train.step import Program


class Engine(Protocol):
    """Trains K runs in lockstep; their order is the loop's.

    Batches are `IndexedBatch`es, or dicts as of `lorax.data.collate`.

    Attributes:
      program: what the runs have in common.
      mesh: where they train; None is one device.
    """

    program: Program
    mesh: Mesh | None

    def compile(self, hyper: Hyper, batch: Any) -> tuple[StepCost, bool]:
        """(the cost of the step for this batch shape, whether it was compiled just now)."""

    def compilation(self, hyper: Hyper, batch: Any) -> Callable[[], Any]:
        """A call that compiles the step for this batch shape, from any thread."""

    def step(self, hyper: Hyper, batch: Any) -> jax.Array:
        """One optimizer step of each run: their losses (K,), not waited for.

        Args:
          hyper: (K,) each.
          batch: leaves (K, ...).
        """

    def read(self, losses: jax.Array) -> np.ndarray:
        """The losses of `step`, waited for: (K,)."""

    def predict(self, batch: Any) -> Any:
        """Outputs of each run for one batch, which has no run axis: (K, N, outputs)."""

    def trainable(self, run: int) -> Any:
        """What a run trains, on the host, in its own shapes."""
