"""Tensors in safetensors files, of which nothing is read before it is asked for."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorax.errors import LoraxError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      file: safetensors.
      name: in the file.
      shape: as the file's header says.
    """

    file: Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads what the slices select, in the dtype of the file; `...` is the whole."""
        if index is ... or all(
            s.indices(n) == (0, n, 1) for s, n in zip(index, self.shape, strict=True)
        ):
            with _opened(self.file, backend="pread") as tensors:  # maps nothing: half the memory
                return tensors.get_tensor(self.name)
        # Opened anew: what was read of a file counts as memory for as long as it is mapped.
        with _opened(self.file) as tensors:
            return tensors.get_slice(self.name)[index]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Name to tensor, from the header of a safetensors file.

    Raises:
      LoraxError: a damaged file.
    """
    with _opened(file) as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return {name: StoredTensor(file, name, tuple(shape)) for name, shape in shapes.items()}


@contextlib.contextmanager
def _opened(file: Path, **options: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy", **options) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise LoraxError(f"{file} is damaged or no safetensors file: {error}") from error
