import math
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp

from lorax.lora.initializers import INITIALIZERS, standard_normal
from lorax.lora.spec import LoraSpec
from lorax.lora.targets import Target, resolve

LoraTree = dict[str, dict[str, jax.Array]]


def init(key: jax.Array, base: Any, spec: LoraSpec) -> LoraTree:
    """A fresh adapter for `base`: a LoRA tree, nothing else.

    The draw of a target depends on the key and its path alone: it is the same whichever other
    targets there are, and a smaller rank is the first rows of a larger one.

    Args:
      key: a JAX PRNG key.
      base: any pytree of arrays or shape structs, such as `nnx.to_pure_dict(state)`.
      spec: what to adapt.

    Returns:
      `{path: {"a": (*stacked, r, d_in), "b": (*stacked, d_out, r)}}` in fp32. The product B A
      is zero: of an embedding A is zero and B is drawn from N(0, 1) (as in PEFT and loralib),
      elsewhere B is zero.

    Raises:
      LoraxError: see `resolve`.

    >>> import jax, jax.numpy as jnp
    >>> base = {"query": {"kernel": jnp.zeros((16, 8))}}
    >>> lora = init(jax.random.key(0), base, LoraSpec(rank=2, targets="q"))
    >>> jax.tree.map(jnp.shape, lora)
    {'query.kernel': {'a': (2, 16), 'b': (8, 2)}}
    """
    return {path: _init_target(key, target, spec) for path, target in resolve(base, spec).items()}


def _init_target(key: jax.Array, target: Target, spec: LoraSpec) -> dict[str, jax.Array]:
    stacked, d_in, d_out = target.matrix_shape
    key = jax.random.fold_in(key, crc32(target.path.encode()))
    initializer = standard_normal if target.is_embedding else INITIALIZERS[spec.init]
    width = d_out if target.is_embedding else d_in

    def draw(layer_key: jax.Array) -> jax.Array:
        return initializer(layer_key, (target.rank, width), target.rank)

    rows = jax.vmap(draw)(_layer_keys(key, math.prod(stacked))) if stacked else draw(key)
    rows = rows.reshape(*stacked, target.rank, width)
    if target.is_embedding:
        a = jnp.zeros((*stacked, target.rank, d_in), jnp.float32)
        return {"a": a, "b": jnp.swapaxes(rows, -1, -2)}
    return {"a": rows, "b": jnp.zeros((*stacked, d_out, target.rank), jnp.float32)}


def _layer_keys(key: jax.Array, count: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
