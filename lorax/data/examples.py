from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Examples:
    """A split as text.

    Attributes:
      first: the first (or only) text of each example.
      second: the second text of each example, or None for a one-text task.
      labels: (N,) int32 class ids, or float32 scores.
    """

    first: list[str]
    second: list[str] | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """The examples at `indices`, in that order."""
        second = None if self.second is None else [self.second[i] for i in indices]
        return Examples([self.first[i] for i in indices], second, self.labels[np.asarray(indices)])
