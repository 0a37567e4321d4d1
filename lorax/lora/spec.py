import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax.errors import LoraxError
from lorax.lora.initializers import INITIALIZERS
from lorax.lora.paths import matches, module_path

SCALINGS = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclass(frozen=True)
class LoraSpec:
    """What is adapted, and how: W + scale * (B A)^T. Immutable and hashable.

    Attributes:
      rank: r, the inner dimension of B A; from 1 to min(d_in, d_out) of every target.
      alpha: numerator of the scale.
      scaling: `lora` for scale = alpha / r (Hu et al. 2021, section 4.1) or `rslora` for
        alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
      targets: one name or several. A name is a group (any of the letters `q`, `k`, `v`, `o`
        together, as in `qv`; `mlp`; `all-linear`), the last components of a module's path
        (`query`, `attention.out`), or a regex over the whole module path.
      exclude: modules left out, named like targets.
      layers: indices of the layers adapted; None for all.
      rank_pattern: other ranks for the modules that a pattern names; the first match counts.
      alpha_pattern: other alphas, likewise.
      dropout: rate on the input of A, in training only.
      init: initialiser of A; a key of `lorax.lora.initializers.INITIALIZERS`. B starts at zero.
      modules_to_save: modules of the base that are trained in full, such as the task's head.
      kernel_axes: for kernels of three or more axes, which are inputs (i), outputs (o) and
        stacked layers (b): `{"attention.out": "iio", "blocks.*": "bio"}`.

    Raises:
      LoraxError: a value out of its range, with the range.

    >>> LoraSpec(rank=8, alpha=16).scale("layers.0.query.kernel")
    2.0
    >>> LoraSpec(rank=4, alpha=8, scaling="rslora").scale("layers.0.query.kernel")
    4.0
    >>> LoraSpec(rank=8, alpha=8, rank_pattern={"value": 2}).scale("layers.0.value.kernel")
    4.0
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: str = "lora"
    targets: str | tuple[str, ...] = "qv"
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    dropout: float = 0.0
    init: str = "kaiming_uniform"
    modules_to_save: tuple[str, ...] = ()
    kernel_axes: Any = ()

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "modules_to_save"):
            object.__setattr__(self, name, _as_names(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "kernel_axes"):
            object.__setattr__(self, name, _as_pairs(name, getattr(self, name)))
        object.__setattr__(self, "layers", _as_indices(self.layers))
        _check(self)

    def rank_of(self, path: str) -> int:
        """The rank of the target whose kernel is at `path`."""
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of the target whose kernel is at `path`."""
        return _first_match(self.alpha_pattern, path, self.alpha)

    def scale(self, path: str) -> float:
        """The factor on B A for the target whose kernel is at `path`."""
        return SCALINGS[self.scaling](self.alpha_of(path), self.rank_of(path))


def _first_match(pairs: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    module = module_path(path)
    return next((value for pattern, value in pairs if matches(pattern, module)), default)


def _as_pairs(field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        named = tuple((pattern, chosen) for pattern, chosen in pairs)
    except (TypeError, ValueError):
        named = ((None, None),)
    if not all(isinstance(pattern, str) and pattern for pattern, _ in named):
        raise LoraxError(f"lora.{field}={value!r} is not a mapping from names to values")
    return named


def _as_indices(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    is_list = isinstance(value, list | tuple | range)
    if not is_list or not all(type(i) is int and i >= 0 for i in value):
        raise LoraxError(f"lora.layers={value!r} is not a list of whole numbers from 0 (or null)")
    return tuple(value)


def _as_names(field: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
        raise LoraxError(f"lora.{field}={value!r} is not a name or a list of names")
    return tuple(names)


def _check(spec: LoraSpec) -> None:
    _check_rank("lora.rank", spec.rank)
    for pattern, rank in spec.rank_pattern:
        _check_rank(f"lora.rank_pattern[{pattern}]", rank)
    _check_alpha("lora.alpha", spec.alpha)
    for pattern, alpha in spec.alpha_pattern:
        _check_alpha(f"lora.alpha_pattern[{pattern}]", alpha)
    if not spec.targets:
        raise LoraxError("lora.targets is empty; name at least one, such as 'qv'")
    _check_option("lora.scaling", spec.scaling, SCALINGS)
    _check_option("lora.init", spec.init, INITIALIZERS)
    if not _is_number(spec.dropout) or not 0.0 <= spec.dropout < 1.0:
        raise LoraxError(f"lora.dropout={spec.dropout!r} is not in [0, 1)")
    for pattern, axes in spec.kernel_axes:
        if not isinstance(axes, str):
            raise LoraxError(f"lora.kernel_axes[{pattern}]={axes!r} is not a string such as 'iio'")
    for pattern in _all_patterns(spec):
        try:
            re.compile(pattern)
        except re.error as fault:
            raise LoraxError(f"lora pattern {pattern!r} is not a valid regex: {fault}") from fault


def _all_patterns(spec: LoraSpec) -> list[str]:
    pairs = (*spec.rank_pattern, *spec.alpha_pattern, *spec.kernel_axes)
    return [*spec.targets, *spec.exclude, *spec.modules_to_save, *(pattern for pattern, _ in pairs)]


def _check_rank(name: str, rank: Any) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LoraxError(f"{name}={rank!r} is not a whole number of at least 1")


def _check_alpha(name: str, alpha: Any) -> None:
    if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
        raise LoraxError(f"{name}={alpha!r} is not a positive number")


def _check_option(name: str, value: Any, table: Mapping[str, Any]) -> None:
    if not isinstance(value, str) or value not in table:
        options = " or ".join(repr(option) for option in table)
        raise LoraxError(f"{name}={value!r} is unknown; use {options}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
