"""Trees of unlike sizes in one, with a leading axis: how many adapters share a program.

Zero padding is exact (see `pad`); so is a target that one adapter lacks and another has: both its
factors are zero there, and stay zero.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.lora.adapter import LoraTree
from lorax.lora.paths import leaf_path, leaves_by_path


def union(adapters: Iterable[LoraTree]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes that hold every one of the adapters: all targets, each at its largest rank.

    Raises:
      LoraxError: a target of adapters of different bases, as far as the number of axes tells.

    >>> one = {"q": {"a": np.ones((2, 3)), "b": np.ones((4, 2))}}
    >>> two = {"q": {"a": np.ones((8, 3)), "b": np.ones((4, 8))}, "v": one["q"]}
    >>> {path: pair["a"].shape for path, pair in union([one, two]).items()}
    {'q': (8, 3), 'v': (2, 3)}
    """
    largest: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for adapter in adapters:
        for path, pair in adapter.items():
            held = largest.setdefault(path, {})
            for name, leaf in pair.items():
                largest_so_far = held.get(name, leaf)
                if len(leaf.shape) != len(largest_so_far.shape):
                    raise LoraxError(
                        f"the adapters of {path!r} have {name} of shapes {largest_so_far.shape} "
                        f"and {leaf.shape}, of different bases"
                    )
                shape = np.maximum(leaf.shape, largest_so_far.shape)
                dtype = jnp.promote_types(leaf.dtype, largest_so_far.dtype)
                held[name] = jax.ShapeDtypeStruct(tuple(map(int, shape)), dtype)
    return largest


def stack(trees: Sequence[Any], like: Any) -> Any:
    """The trees as one of NumPy arrays with a leading axis, (K, ...).

    Args:
      trees: of arrays; each leaf is zero-padded at its ends, and zero where a tree lacks it.
      like: a tree of arrays or shape structs, of the common structure and shapes.

    Raises:
      LoraxError: a leaf that `like` lacks or that is larger than its.

    >>> stack([{"w": np.ones(1)}, {"w": np.ones(2)}], {"w": np.zeros(2)})["w"].tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    flat = [leaves_by_path(tree) for tree in trees]
    known = set(leaves_by_path(like))
    if unknown := [name for leaves in flat for name in leaves if name not in known]:
        raise LoraxError(f"{unknown[0]!r} has no place in the stack")

    def leaf(path: tuple[Any, ...], want: Any) -> np.ndarray:
        name = leaf_path(path)
        stacked = np.zeros((len(trees), *want.shape), want.dtype)
        for n, leaves in enumerate(flat):
            if name in leaves:
                value = np.asarray(leaves[name])
                _check_fit(name, value.shape, want.shape)
                corner = tuple(slice(size) for size in value.shape)
                stacked[n : n + 1][(slice(None), *corner)] = value
        return stacked

    return jax.tree_util.tree_map_with_path(leaf, like)


def _check_fit(name: str, shape: tuple[int, ...], room: tuple[int, ...]) -> None:
    if len(shape) != len(room) or any(n > m for n, m in zip(shape, room, strict=True)):
        raise LoraxError(f"{name!r} of shape {shape} does not fit into {room}")


def unstack(stacked: Any, index: int, like: Any) -> Any:
    """One of the trees that `stack` took, cut back to its own leaves and shapes.

    Args:
      stacked: of `stack`, or its leaves by path.
      index: which one.
      like: a tree of arrays or shape structs, of the structure and shapes to cut out.

    Raises:
      LoraxError: a leaf that the stack lacks or that is smaller there.

    >>> unstack({"w": np.ones((2, 3))}, 1, {"w": np.zeros(2)})["w"].tolist()
    [1.0, 1.0]
    """
    leaves = leaves_by_path(stacked)

    def leaf(path: tuple[Any, ...], want: Any) -> np.ndarray:
        name = leaf_path(path)
        if name not in leaves:
            raise LoraxError(f"{name!r} is not in the stack")
        row = np.asarray(leaves[name])[index]
        value = row[tuple(slice(n) for n in np.shape(want))]
        if value.shape != np.shape(want):
            raise LoraxError(f"{name!r} has shape {row.shape} in the stack, not {np.shape(want)}")
        return np.array(value)  # a copy, which does not keep the whole stack alive

    return jax.tree_util.tree_map_with_path(leaf, like)
