"""A parameter of ours in a checkpoint, of which any part can be read when it is needed."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lorax.errors import LoraxError, one_line


class Shaped(Protocol):
    """Whatever has a shape: an array or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""


class Tensor(Shaped, Protocol):
    """What a checkpoint holds: an array, or one that is read when it is indexed."""

    @property
    def dtype(self) -> Any:
        """Of NumPy; the name that safetensors has for one that NumPy lacks."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """What the slices select."""


Bounds = tuple[tuple[int, int], ...]  # first and past the last, of each axis


@dataclass(frozen=True)
class LazyParameter:
    """A parameter of ours in a checkpoint, not read yet.

    Attributes:
      tensor: what holds it.
      shape: in our layout.
      is_transposed: the tensor has the axes the other way round.
      start: where in the tensor's outputs, our last axis, it begins.
      order: for each of our outputs the tensor's; None: as they are.
      name: of the tensor, for messages.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    is_transposed: bool = False
    start: int = 0
    order: tuple[int, ...] | None = None
    name: str = ""

    def read(self, bounds: Bounds | None = None) -> np.ndarray:
        """The parameter, or the part of it within the bounds, in our layout.

        Raises:
          LoraxError: a value that is not finite.

        >>> fused = np.arange(12).reshape(2, 6)
        >>> LazyParameter(fused, (2, 3), start=3).read(((1, 2), (0, 2)))
        array([[ 9, 10]])
        >>> LazyParameter(np.array([0.0, 10.0, 20.0]), (3,), order=(2, 0, 1)).read(((0, 2),))
        array([20.,  0.])
        """
        *others, (first, last) = bounds or tuple((0, n) for n in self.shape)
        if self.order is not None:
            whole = replace(self, order=None).read((*others, (0, self.shape[-1])))
            return whole[..., list(self.order[first:last])]
        ends = (*others, (first + self.start, last + self.start))
        index = tuple(slice(*pair) for pair in ends)
        array = self.tensor[index[::-1] if self.is_transposed else index]
        if not _is_finite(array):
            raise LoraxError(
                f"{one_line(self.name)} holds NaN or infinity: the checkpoint is damaged, or was "
                "saved in a dtype too narrow for it; download or save it again"
            )
        return array.T if self.is_transposed else array


def _is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite; in parts, which spares an array of booleans of its size."""
    flat, most = array.reshape(-1), 2**20
    return all(np.isfinite(flat[n : n + most]).all() for n in range(0, flat.size, most))
