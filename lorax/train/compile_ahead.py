"""Compiles the step for later shapes while the steps of the first shape run."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lorax.train.engine import Engine
from lorax.train.optimizer import Hyper


class CompileAhead:
    """A thread that compiles the step for coming shapes.

    The loop waits for a program that it needs before its compilation ends, and gets a fault of
    the compilation there.

    Args:
      engine: computes the step.
      hyper: of any step.
      batches: one for each shape, in the order in which they are needed.
    """

    def __init__(self, engine: Engine, hyper: Hyper, batches: Iterable[Any]):
        self._pool = ThreadPoolExecutor(1, "compile-ahead")
        for batch in batches:
            self._pool.submit(engine.compilation(hyper, batch))

    def __enter__(self) -> "CompileAhead":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the current compilation; do not start another."""
        self._pool.shutdown(cancel_futures=True)
