"""The masks of dropout, by a counter-based hash of a key and of each element's position.

A mask needs one random word for each of its elements. `jax.random.bernoulli` takes them from
threefry, 20 rounds a pair of words, which XLA compiles for every mask of a model. What that costs a
step in time and memory on a CPU is in docs/sweeps.md, with the command.

Here the word of an element is a hash of its position and of the key's words. That is the
counter-based scheme of Salmon et al. (2011, "Parallel random numbers: as easy as 1, 2, 3"). The
hash is `lowbias32`, which Chris Wellons found by search ("hash prospector", 2018): two
multiplications, three shifts. It is not cryptographic: who sees a mask may find its key. Its
statistical quality is tested in tests/lora/test_dropout_masks.py. Keys are still derived by
`jax.random.fold_in` and `split`, so that threefry separates steps, micro-batches, layers and lanes.
"""

import math

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError

GENERATOR = "lowbias32"  # recorded with every trial that draws masks: a new one is a new name
WORDS = 2**32


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Whether dropout keeps each element: bool of `shape`, each True with probability 1 - rate.

    The probability is exact to 2^-33. An element's value depends on the key and on its position in
    row-major order alone: rows added at the end change none of the others.

    Raises:
      LoraxError: more than 2^32 elements, whose positions do not fit into a word.
    """
    threshold = round((1 - rate) * WORDS)
    if threshold == WORDS:  # no word is as large
        return jnp.ones(shape, bool)
    return random_words(key, shape) < jnp.uint32(threshold)


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform random uint32 of `shape`.

    Raises:
      LoraxError: see `keep_mask`.
    """
    size = math.prod(shape)
    if size > WORDS:
        raise LoraxError(
            f"a dropout mask of shape {shape} has {size} elements, more than 2^32: "
            "use smaller batches or shorter sequences"
        )
    first, *others = jax.random.key_data(key)
    words = jax.lax.iota(jnp.uint32, size).reshape(shape) ^ first
    for word in others:
        words = _lowbias32(words) + word
    return _lowbias32(words)


def _lowbias32(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of `x` changes about half of the result's bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
