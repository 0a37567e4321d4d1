from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from lorax import data
from lorax.config import TrialConfig
from lorax.lora.paths import leaves_by_path
from lorax.runtime.compiler import compile_cost
from lorax.train.dataset import load_dataset
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import State, init_state, predict, train_step


class Bench:
    """A trial's parts, to be stepped by hand."""

    def __init__(self, config: TrialConfig):
        self.config = config
        self.dataset = load_dataset(config)
        self.setup = prepare(config)
        self.hyper = hyper_of(config)
        self.state = self.fresh()

    def fresh(self) -> State:
        """The first state, in arrays of its own: a step donates its state."""
        state = init_state(self.setup.trainable, self.hyper, self.setup.dropout_key)
        return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)

    def batches(self, epochs: int = 1) -> list[dict[str, np.ndarray]]:
        train, encoded = self.config.train, self.dataset.train
        order = [
            indices
            for epoch in range(epochs)
            for indices in data.train_batches(
                len(encoded), train.batch_size, seed=self.config.seed, epoch=epoch
            )
        ]
        return [
            data.collate_alike(
                encoded,
                [indices],
                self.dataset.layout,
                parts=train.grad_accum,
                pad_id=self.dataset.pad_id,
            )[0]
            for indices in order
        ]

    def step(self, batch: Any) -> float:
        program, parts = self.setup.program, (self.state, self.setup.frozen, self.hyper, batch)
        if program.saves_memory:  # as trials compile it; else XLA of a CPU would save none
            step = compile_cost(train_step, program, *parts, keeps_barriers=True)[1]
            self.state, loss = step(*parts)
        else:
            self.state, loss = train_step(program, *parts)
        return float(loss)

    def predict(self, batch: Any) -> np.ndarray:
        trainable, frozen = self.state.trainable, self.setup.frozen
        return np.asarray(predict(self.setup.program, trainable, frozen, batch))

    def leaves(self) -> dict[str, np.ndarray]:
        """Every parameter by path: what is trained and what is frozen."""
        both = leaves_by_path(self.state.trainable) | leaves_by_path(self.setup.frozen.params)
        return {path: np.array(leaf) for path, leaf in both.items()}


@pytest.fixture
def bench(world) -> Callable[..., Bench]:
    return lambda **changes: Bench(world.trial(**changes))
