import math
from typing import Any

import jax

from lorax.lora.spec import LoraSpec
from lorax.lora.targets import resolve


def count_params(tree: Any) -> int:
    """Numbers in all leaves of a tree of arrays or shape structs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or shape structs."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_lora_params(base: Any, spec: LoraSpec) -> int:
    """Numbers an adapter of `spec` has: r (d_in + d_out) a target, without making it.

    >>> import jax.numpy as jnp
    >>> count_lora_params({"query": {"kernel": jnp.zeros((16, 8))}}, LoraSpec(2, targets="q"))
    48
    """
    total = 0
    for target in resolve(base, spec).values():
        stacked, d_in, d_out = target.matrix_shape
        total += math.prod(stacked) * target.rank * (d_in + d_out)
    return total
