"""How A is drawn. B starts at zero, so that an adapted model starts as its base.

Each row of A, of shape (d_in,), is drawn from its own key. Rows are keyed by their index: the first
4 rows of a rank-16 draw are the rank-4 draw, whatever the PRNG.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# From a key, the shape (r, d_in) and the target's rank to rows of A.
Initializer = Callable[[jax.Array, tuple[int, int], int], jax.Array]


@partial(jax.jit, static_argnames=("shape", "bound"))
def _uniform_rows(key: jax.Array, shape: tuple[int, int], bound: float) -> jax.Array:
    def draw(row_key: jax.Array) -> jax.Array:
        return jax.random.uniform(row_key, shape[1:], jnp.float32, -bound, bound)

    return jax.vmap(draw)(_row_keys(key, shape[0]))


@partial(jax.jit, static_argnames="shape")
def _normal_rows(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    def draw(row_key: jax.Array) -> jax.Array:
        return jax.random.normal(row_key, shape[1:], jnp.float32)

    return jax.vmap(draw)(_row_keys(key, shape[0]))


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def kaiming_uniform(key: jax.Array, shape: tuple[int, int], rank: int) -> jax.Array:
    """Uniform in ±1/sqrt(d_in): PEFT and loralib's kaiming_uniform with a = sqrt 5."""
    del rank
    return _uniform_rows(key, shape, 1 / math.sqrt(shape[1]))


def he_uniform(key: jax.Array, shape: tuple[int, int], rank: int) -> jax.Array:
    """Uniform in ±sqrt(6/d_in): the default of flax.nnx.LoRA and Qwix."""
    del rank
    return _uniform_rows(key, shape, math.sqrt(6 / shape[1]))


def gaussian(key: jax.Array, shape: tuple[int, int], rank: int) -> jax.Array:
    """Normal of std 1/r: PEFT's "gaussian". Ranks are nested up to that factor."""
    return _normal_rows(key, shape) / rank


def normal(key: jax.Array, shape: tuple[int, int], rank: int) -> jax.Array:
    """Normal of std 0.02: as BERT and GPT-2 draw their own weights."""
    del rank
    return 0.02 * _normal_rows(key, shape)


def standard_normal(key: jax.Array, shape: tuple[int, int], rank: int) -> jax.Array:
    """Normal of std 1: B of an embedding, whose A starts at zero."""
    del rank
    return _normal_rows(key, shape)


INITIALIZERS: dict[str, Initializer] = {
    "kaiming_uniform": kaiming_uniform,
    "he_uniform": he_uniform,
    "gaussian": gaussian,
    "normal": normal,
}
