"""How A is drawn. B starts at zero, so that an adapted model starts as its base.

Each initialiser draws one row of A, of shape (d_in,), from its own key. Rows are keyed by
their index: the first 4 rows of a rank-16 draw are the rank-4 draw, whatever the PRNG.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Initializer = Callable[[jax.Array, int, int], jax.Array]


def _uniform(bound: float, key: jax.Array, d_in: int) -> jax.Array:
    return jax.random.uniform(key, (d_in,), jnp.float32, -bound, bound)


def kaiming_uniform(key: jax.Array, d_in: int, rank: int) -> jax.Array:
    """Uniform in ±1/sqrt(d_in): PEFT and loralib's kaiming_uniform with a = sqrt 5."""
    del rank
    return _uniform(1 / math.sqrt(d_in), key, d_in)


def he_uniform(key: jax.Array, d_in: int, rank: int) -> jax.Array:
    """Uniform in ±sqrt(6/d_in): the default of flax.nnx.LoRA and Qwix."""
    del rank
    return _uniform(math.sqrt(6 / d_in), key, d_in)


def gaussian(key: jax.Array, d_in: int, rank: int) -> jax.Array:
    """Normal of std 1/r: PEFT's "gaussian". Ranks are nested up to that factor."""
    return jax.random.normal(key, (d_in,), jnp.float32) / rank


def normal(key: jax.Array, d_in: int, rank: int) -> jax.Array:
    """Normal of std 0.02: as BERT and GPT-2 draw their own weights."""
    del rank
    return 0.02 * jax.random.normal(key, (d_in,), jnp.float32)


INITIALIZERS: dict[str, Initializer] = {
    "kaiming_uniform": kaiming_uniform,
    "he_uniform": he_uniform,
    "gaussian": gaussian,
    "normal": normal,
}


def draw_rows(
    initializer: Initializer, key: jax.Array, shape: tuple[int, int], rank: int
) -> jax.Array:
    """Rows of A, of `shape` (r, d_in), row i from `fold_in(key, i)`."""
    rows, d_in = shape
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))
    return jax.vmap(lambda row_key: initializer(row_key, d_in, rank))(keys)
