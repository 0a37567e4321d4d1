"""An adapter folded into its base: the way in for any function of a pytree."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.lora.adapter import LoraTree
from lorax.lora.kernels import from_matrix, matrix_shape
from lorax.lora.paths import leaf_paths, leaves_by_path
from lorax.lora.spec import LoraSpec
from lorax.lora.targets import kernel_axes

Scales = LoraSpec | Mapping[str, Any]


def scales_of(lora: LoraTree, scales: Scales) -> Mapping[str, Any]:
    """The factor on B A of every target, from a spec; a mapping passes through.

    A mapping may hold traced scalars, so that one compiled program serves every alpha.
    """
    if isinstance(scales, LoraSpec):
        return {path: scales.scale(path) for path in lora}
    if missing := [path for path in lora if path not in scales]:
        raise LoraxError(f"no scale for the adapter's target {missing[0]!r} in the mapping")
    return scales


def delta(
    pair: Mapping[str, jax.Array], scale: Any, shape: tuple[int, ...], axes: str = "io"
) -> jax.Array:
    """Scale * (B A)^T as a kernel of `shape`; computed in the pair's own precision."""
    matrix = jnp.einsum("...or,...ri->...io", pair["b"], pair["a"]) * scale
    return from_matrix(matrix, shape, axes)


def merge(base: Any, lora: LoraTree, spec: Scales) -> Any:
    """W + scale * (B A)^T on every target; the other leaves are returned as they are.

    Args:
      base: any pytree of kernels.
      lora: the adapter, as `init` makes it; ranks may be padded.
      spec: a LoraSpec, or each target's scale by path (then kernels must be matrices).

    Returns:
      A pytree like `base`, each kernel in its own dtype.

    Raises:
      LoraxError: a target of the adapter that is not in the base, does not fit it, has no scale,
        or is quantized: the sum would be rounded to integers.

    >>> base = {"w": jnp.zeros((3, 2))}
    >>> lora = {"w": {"a": jnp.ones((1, 3)), "b": jnp.ones((2, 1))}}
    >>> merge(base, lora, {"w": 0.5})["w"].tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    return _add(base, lora, spec, sign=1)


def unmerge(merged: Any, lora: LoraTree, spec: Scales) -> Any:
    """The base again, up to rounding: the inverse of `merge`."""
    return _add(merged, lora, spec, sign=-1)


def _add(base: Any, lora: LoraTree, spec: Scales, sign: int) -> Any:
    factors = scales_of(lora, spec)
    rules = spec if isinstance(spec, LoraSpec) else LoraSpec()
    _check_floats(base, lora)
    check_fit(base, lora, rules)

    def leaf(path: str, kernel: jax.Array) -> jax.Array:
        if path not in lora:
            return kernel
        axes = kernel_axes(path, kernel.shape, rules)
        change = delta(lora[path], sign * factors[path], kernel.shape, axes)
        exact = jnp.promote_types(kernel.dtype, change.dtype)
        return (kernel.astype(exact) + change.astype(exact)).astype(kernel.dtype)

    leaves, structure = jax.tree.flatten(base)
    return jax.tree.unflatten(structure, map(leaf, leaf_paths(base), leaves))


def _check_floats(base: Any, lora: LoraTree) -> None:
    """Refuse targets whose kernels are integers, alone or beside scales."""
    for path, leaf in leaves_by_path(base).items():
        target = next((t for t in lora if path == t or path.startswith(f"{t}.")), None)
        if target is not None and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise LoraxError(
                f"the kernel of {target!r} is quantized ({leaf.dtype}), and an update added to it "
                "would be rounded away: merge into the base in float32 or bfloat16"
            )


def check_fit(base: Any, lora: LoraTree, spec: LoraSpec) -> None:
    """Refuse an adapter that is not one of this base.

    Raises:
      LoraxError: naming the first target that is missing or has another shape.
    """
    kernels = leaves_by_path(base)
    for path, pair in lora.items():
        if path not in kernels:
            raise LoraxError(f"the adapter's target {path!r} is not in the base")
        shape = kernels[path].shape
        stacked, d_in, d_out = matrix_shape(shape, kernel_axes(path, shape, spec))
        rank = pair["a"].shape[-2]
        expected = (*stacked, rank, d_in), (*stacked, d_out, rank)
        if (pair["a"].shape, pair["b"].shape) != expected:
            raise LoraxError(
                f"the adapter of {path!r} has A {pair['a'].shape} and B {pair['b'].shape}; "
                f"its kernel {shape} needs A {expected[0]} and B {expected[1]}"
            )
