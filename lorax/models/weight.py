"""A parameter of ours within a checkpoint, of which any part can be read."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Shaped(Protocol):
    """Whatever has a shape: an array or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""


class Tensor(Shaped, Protocol):
    """What a checkpoint holds: an array, or one that is read when it is indexed."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """What the slices select."""


Bounds = tuple[tuple[int, int], ...]  # first and past the last, of each axis


@dataclass(frozen=True)
class Weight:
    """A parameter of ours in a checkpoint, not read yet.

    Attributes:
      tensor: what holds it.
      shape: in our layout.
      is_transposed: the tensor has the axes the other way round.
      start: where in the tensor's outputs, our last axis, it begins.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    is_transposed: bool = False
    start: int = 0

    def read(self, bounds: Bounds | None = None) -> np.ndarray:
        """The parameter, or the part of it within the bounds, in our layout.

        >>> fused = np.arange(12).reshape(2, 6)
        >>> Weight(fused, (2, 3), start=3).read(((1, 2), (0, 2)))
        array([[ 9, 10]])
        """
        *others, (first, last) = bounds or tuple((0, n) for n in self.shape)
        ends = (*others, (first + self.start, last + self.start))
        index = tuple(slice(*pair) for pair in ends)
        return self.tensor[index[::-1]].T if self.is_transposed else self.tensor[index]
