"""Dotted names for the leaves of any pytree, and how a pattern selects them."""

import re
from typing import Any

import jax
from flax import nnx
from flax.core import meta

LEAF_NAMES = frozenset({"kernel", "weight", "embedding", "w"})


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """Dotted name of one leaf, from JAX's key path.

    >>> import jax
    >>> tree = {"layers": [{"query": {"kernel": 0.0}}]}
    >>> [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['layers.0.query.kernel']
    """
    last = key_path[-1:]
    if last and isinstance(last[0], jax.tree_util.GetAttrKey) and last[0].name == "value":
        key_path = key_path[:-1]  # an NNX Variable inside a State is a node round its array
    return _dotted(key_path)


def _dotted(key_path: tuple[Any, ...]) -> str:
    names = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in key_path)
    return ".".join(map(str, names))


def leaf_paths(tree: Any) -> list[str]:
    """The dotted names of all leaves, in tree order.

    The box that Flax puts round an array has no name of its own; a field called `value` has.
    """
    names: list[str] = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        skip = 1 if _is_box(node) else 0
        inner = jax.tree_util.tree_leaves_with_path(node)
        names.extend(_dotted((*path, *below[skip:])) for below, _ in inner)
    return names


def _is_box(node: Any) -> bool:
    return isinstance(node, nnx.Variable | meta.AxisMetadata)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """All leaves of `tree` under their dotted names, in tree order."""
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def module_path(path: str) -> str:
    """The module that owns a leaf: `a.query.kernel` -> `a.query`; `a.wq` stays as it is."""
    head, _, leaf = path.rpartition(".")
    return head if head and leaf in LEAF_NAMES else path


def layer_index(path: str) -> int | None:
    """The first whole number in a path, which by convention counts the layers."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def matches(pattern: str, module: str) -> bool:
    r"""Whether `pattern` names `module`: as its last components, or as a regex over all of it.

    >>> matches("query", "layers.0.query"), matches("ery", "layers.0.query")
    (True, False)
    >>> matches(r"layers\.[01]\..*", "layers.0.query")
    True
    """
    if module == pattern or module.endswith("." + pattern):
        return True
    return re.fullmatch(pattern, module) is not None


def matches_ancestor(pattern: str, path: str) -> bool:
    """Whether `pattern` names the leaf at `path`, its module or any module round it.

    >>> matches_ancestor("head", "head.out.kernel"), matches_ancestor("head", "heads.kernel")
    (True, False)
    """
    parts = path.split(".")
    return any(matches(pattern, ".".join(parts[:n])) for n in range(1, len(parts) + 1))
