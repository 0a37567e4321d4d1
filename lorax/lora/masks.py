"""What is trained: an Optax mask that partitions the tree before any gradient is taken.

Gradients, clipping and optimizer state then exist for the trainable part only. (Masking the
optimizer alone would let raw gradients of frozen leaves through and clip by a wrong norm.)
"""

from collections.abc import Iterable
from typing import Any

import jax

from lorax.errors import LoraxError
from lorax.lora.paths import leaf_paths, matches_ancestor
from lorax.lora.spec import LoraSpec


def trainable_mask(params: dict[str, Any], spec: LoraSpec) -> dict[str, Any]:
    """The Optax mask of LoRA training: True for the adapter and `spec.modules_to_save`.

    Args:
      params: `{"base": any pytree, "lora": an adapter}`.
      spec: its `modules_to_save` name modules of the base that are trained in full.

    Raises:
      LoraxError: no adapter in `params`, or a module to save that matches nothing.

    >>> params = {"base": {"w": 1.0, "head": {"bias": 2.0}}, "lora": {"w": {"a": 0.0, "b": 0.0}}}
    >>> trainable_mask(params, LoraSpec(modules_to_save=("head",)))
    {'base': {'head': {'bias': True}, 'w': False}, 'lora': {'w': {'a': True, 'b': True}}}
    """
    if set(params) != {"base", "lora"} or not params["lora"]:
        raise LoraxError("params must be {'base': ..., 'lora': ...} with an adapter of lorax.init")
    base = mask_of(params["base"], spec.modules_to_save)
    return {"base": base, "lora": jax.tree.map(lambda _: True, params["lora"])}


def mask_of(tree: Any, modules: Iterable[str]) -> Any:
    """An Optax mask: True for every leaf inside a module that one of the names means.

    Raises:
      LoraxError: a name that matches nothing.
    """
    paths = leaf_paths(tree)
    chosen: set[str] = set()
    for name in modules:
        found = {path for path in paths if matches_ancestor(name, path)}
        if not found:
            tops = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths))
            raise LoraxError(f"module {name!r} matches nothing in the tree, which has: {tops}")
        chosen |= found
    return jax.tree.unflatten(jax.tree.structure(tree), [path in chosen for path in paths])


def split(tree: Any, mask: Any) -> tuple[Any, Any]:
    """(trainable, frozen): two trees like `tree`, each with None where the other has a leaf.

    `jax.grad`, Optax and Orbax skip None, so the first is all they see.

    Raises:
      LoraxError: a mask of another structure, or one that trains nothing.

    >>> split({"a": 1, "b": 2}, {"a": True, "b": False})
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    if jax.tree.structure(tree) != jax.tree.structure(mask):  # type: ignore[operator]
        raise LoraxError("the mask has another structure than the tree it should split")
    if not any(jax.tree.leaves(mask)):
        raise LoraxError("the mask trains nothing: every leaf of it is False")
    trainable = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return trainable, frozen


def combine(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`.

    >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda left, right: right if left is None else left,
        trainable,
        frozen,
        is_leaf=lambda leaf: leaf is None,
    )
