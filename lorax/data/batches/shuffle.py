"""Permutations that are the same on every machine and NumPy release."""

from typing import Protocol, TypeVar

import numpy as np

from lorax.errors import LoraxError


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of `range(n)` that depends on `n` and the non-negative `key` only.

    NumPy guarantees the raw stream of a bit generator, but not `Generator.permutation`.

    >>> permutation(6, 0, 1).tolist() == permutation(6, 0, 1).tolist()
    True
    """
    seed = len(key), *key  # NumPy pads with zeros: (1,) and (1, 0) would be the same seed
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


class _Subsettable(Protocol):
    def __len__(self) -> int: ...
    def subset(self, indices: np.ndarray, /): ...


T = TypeVar("T", bound=_Subsettable)


def subsample(data: T, n: int | None) -> T:
    """Draw `n` examples by a fixed permutation that is independent of the training seed.

    The draw of a smaller `n` is a prefix of the draw of a larger one.

    Args:
      data: `Examples` or `Encoded`.
      n: number of examples; None, or a number not below the split's, returns `data` itself.

    Raises:
      LoraxError: `n` is not positive.
    """
    if n is None or n >= len(data):
        return data
    if n < 1:
        raise LoraxError(f"cannot keep {n} examples: task.max_*_samples must be at least 1 or null")
    return data.subset(permutation(len(data), 0)[:n])
