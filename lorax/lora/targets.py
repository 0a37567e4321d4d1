"""Which kernels of a base a spec adapts."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorax.errors import LoraxError
from lorax.lora.kernels import check_axes, matrix_shape
from lorax.lora.paths import layer_index, leaves_by_path, matches, module_path
from lorax.lora.spec import LoraSpec

ATTENTION_NAMES = {
    "q": frozenset({"query", "q_proj", "q_lin", "query_proj", "wq", "q"}),
    "k": frozenset({"key", "k_proj", "k_lin", "key_proj", "wk", "k"}),
    "v": frozenset({"value", "v_proj", "v_lin", "value_proj", "wv", "v"}),
    "o": frozenset({"out", "o_proj", "out_proj", "out_lin", "wo", "o"}),
}
MLP_NAMES = frozenset(
    {"up", "down", "gate", "up_proj", "down_proj", "gate_proj", "fc1", "fc2", "lin1", "lin2"}
    | {"c_fc", "wi", "wi_0", "wi_1", "w1", "w2", "w3"}
)
NOT_LINEAR = frozenset({"embedding", "bias", "scale", "taps"})  # of two axes where heads are split
GROUPS = "groups: any of q k v o together, mlp, all-linear"
HEAD_NAMES = frozenset({"head", "classifier", "score", "lm_head", "qa_outputs"})


@dataclass(frozen=True)
class Target:
    """One adapted kernel: A is (*stacked, rank, d_in), B is (*stacked, d_out, rank)."""

    path: str
    shape: tuple[int, ...]
    axes: str
    rank: int
    scale: float

    @property
    def matrix_shape(self) -> tuple[tuple[int, ...], int, int]:
        """(stacked shape, d_in, d_out) of the kernel."""
        return matrix_shape(self.shape, self.axes)

    @property
    def is_embedding(self) -> bool:
        """Whether the kernel is a table of rows that are looked up."""
        return self.path.rpartition(".")[2] == "embedding"


def resolve(base: Any, spec: LoraSpec) -> dict[str, Target]:
    """The kernels of `base` that `spec` adapts, by path.

    Args:
      base: any pytree of arrays or shape structs.
      spec: what to adapt.

    Raises:
      LoraxError: a name, layer or pattern that matches nothing (and what there is instead), a
        rank above min(d_in, d_out), or a kernel of three or more axes that `kernel_axes`
        does not describe.

    >>> import jax.numpy as jnp
    >>> base = {"layers": [{"query": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}]}
    >>> list(resolve(base, LoraSpec(rank=2, targets="q")))
    ['layers.0.query.kernel']
    """
    kernels = {
        path: tuple(leaf.shape)
        for path, leaf in leaves_by_path(base).items()
        if len(getattr(leaf, "shape", ())) >= 2
    }
    chosen = _choose(list(kernels), spec)
    _check_patterns(chosen, spec)
    return {path: _target(path, kernels[path], spec) for path in chosen}


def _choose(paths: list[str], spec: LoraSpec) -> list[str]:
    named = {path for n in _entries(spec.targets) for path in _named("targets", n, paths)}
    named -= {path for n in _entries(spec.exclude) for path in _named("exclude", n, paths)}
    if not named:
        raise LoraxError(f"lora.exclude={list(spec.exclude)} leaves no target of {spec.targets}")
    if spec.layers is not None:
        present = sorted({i for p in named if (i := layer_index(p)) is not None})
        if missing := sorted(set(spec.layers) - set(present)):
            span = f"{present[0]} to {present[-1]}" if present else "none"
            raise LoraxError(f"lora.layers has {missing}, but the layers of the targets are {span}")
        named = {path for path in named if layer_index(path) in spec.layers}
        if not named:
            raise LoraxError("lora.layers is empty; give indices, or null for all layers")
    return [path for path in paths if path in named]


def _entries(targets: Iterable[str]) -> list[str]:
    """Targets with `qkvo`-like groups taken apart, so that each letter must match something."""
    entries: list[str] = []
    for name in targets:
        letters = set(name) <= set(ATTENTION_NAMES) and len(set(name)) == len(name)
        entries.extend(name if letters else [name])
    return entries


def _named(field: str, name: str, paths: list[str]) -> list[str]:
    linear = [path for path in paths if _is_linear(path)]
    last = {path: module_path(path).rpartition(".")[2] for path in linear}
    if name in ATTENTION_NAMES:
        found = [path for path in linear if last[path] in ATTENTION_NAMES[name]]
    elif name == "mlp":
        found = [path for path in linear if last[path] in MLP_NAMES]
    elif name == "all-linear":
        found = linear
    else:
        found = [path for path in paths if matches(name, module_path(path))]
    if not found:
        raise LoraxError(f"lora.{field}={name!r} {_no_match(name, paths)}; {GROUPS}")
    return found


def _is_linear(path: str) -> bool:
    parts = path.split(".")
    return parts[-1] not in NOT_LINEAR and not HEAD_NAMES & set(parts)


def _no_match(name: str, paths: list[str]) -> str:
    modules = list(dict.fromkeys(module_path(path).rpartition(".")[2] for path in paths))
    near = difflib.get_close_matches(name, modules, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"matches no kernel{hint}; modules here: {', '.join(modules) or 'none'}"


def _check_patterns(chosen: list[str], spec: LoraSpec) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(spec, field):
            if not any(matches(pattern, module_path(path)) for path in chosen):
                raise LoraxError(f"lora.{field} {pattern!r} {_no_match(pattern, chosen)}")


def kernel_axes(path: str, shape: tuple[int, ...], spec: LoraSpec) -> str:
    """The axes of a kernel: as `spec.kernel_axes` says, or `io` for a matrix."""
    module = module_path(path)
    axes = next((a for p, a in spec.kernel_axes if p == path or matches(p, module)), None)
    if axes is None and len(shape) != 2:
        raise LoraxError(
            f"kernel {path!r} has shape {shape}: say which axes are inputs and outputs, "
            f"kernel_axes={{{module!r}: 'i..o'}} (lorax.kernel_axes reads them off an NNX model)"
        )
    axes = axes or "io"
    check_axes(path, shape, axes)
    return axes


def _target(path: str, shape: tuple[int, ...], spec: LoraSpec) -> Target:
    axes, rank = kernel_axes(path, shape, spec), spec.rank_of(path)
    _, d_in, d_out = matrix_shape(shape, axes)
    if rank > min(d_in, d_out):
        raise LoraxError(
            f"lora rank {rank} is above min(d_in, d_out) = {min(d_in, d_out)} of {path!r}; "
            f"use a rank from 1 to {min(d_in, d_out)}"
        )
    return Target(path, shape, axes, rank, spec.scale(path))
