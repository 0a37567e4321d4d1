"""Lazy tensors of safetensors files: nothing is read before it is indexed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError, one_line

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
FLOATS = tuple(_DTYPES.values())  # that weights are read from
_DTYPES |= {
    "BOOL": np.dtype(np.bool_),
    **{f"I{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"U{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
      file: safetensors.
      name: in the file.
      shape: as the file's header says.
      dtype: of NumPy; the name that safetensors has for one that NumPy lacks, as `F8_E4M3`.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | str

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads what the slices select, in the dtype of the file; `...` is the whole.

        Raises:
          LoraxError: a damaged file, or a dtype that NumPy lacks.
        """
        if isinstance(self.dtype, str):
            known = ", ".join(map(str, FLOATS))
            raise LoraxError(
                f"{self.file}: {one_line(self.name)} is stored as {self.dtype}, not in one of "
                f"{known}"
            )
        if index is ... or all(
            s.indices(n) == (0, n, 1) for s, n in zip(index, self.shape, strict=True)
        ):
            with _opened(self.file, backend="pread") as tensors:  # maps nothing: half the memory
                return tensors.get_tensor(self.name)
        # Opened anew: what was read of a file counts as memory for as long as it is mapped.
        with _opened(self.file) as tensors:
            return tensors.get_slice(self.name)[index]


def lazy_tensors(file: Path) -> dict[str, LazyTensor]:
    """Name to tensor, from the header of a safetensors file.

    Raises:
      LoraxError: a damaged file.
    """
    with _opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {
            name: LazyTensor(
                file, name, tuple(x.get_shape()), _DTYPES.get(x.get_dtype(), x.get_dtype())
            )
            for name, x in slices.items()
        }


@contextlib.contextmanager
def _opened(file: Path, **options: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy", **options) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise LoraxError(f"{file} is damaged or no safetensors file: {one_line(error)}") from error
