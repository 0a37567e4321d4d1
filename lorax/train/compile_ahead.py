"""Compiles the step for the shapes to come, while the steps of the first shape are computed."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lorax.train.engine import Engine
from lorax.train.optimizer import Hyper


class CompileAhead:
    """A thread that compiles.

    A shape that is needed before its program is done is waited for; a fault of a compilation is
    raised there, too.

    Args:
      engine: whose step it is.
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
        """Wait for the program that is being compiled; do not begin another."""
        self._pool.shutdown(cancel_futures=True)
