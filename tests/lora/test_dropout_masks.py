"""The generator of dropout masks: its definition, its statistical quality, what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.lora.dropout import keep_mask, random_words

N = 1 << 16
SIGMAS = 5  # a sound generator exceeds it once in two million comparisons


def as_python(position, words):
    """The definition in plain integers."""

    def lowbias32(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    return lowbias32((lowbias32(position ^ words[0]) + words[1]) % 2**32)


def masks(keys, rate=0.5, shape=(N,)):
    return np.asarray(jax.vmap(lambda key: keep_mask(key, rate, shape))(keys))


def folded(count, seed=0):
    """Keys of `count` steps in a row."""
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(jnp.arange(count))


def correlation(one, other):
    """Of two sets of fair bits, in standard deviations."""
    agree = np.mean(one == other)
    return abs(agree - 0.5) * 2 * one.size**0.5


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_words_are_the_definitions(seed):
    key = jax.random.key(seed)
    words = [int(word) for word in jax.random.key_data(key)]
    got = np.asarray(random_words(key, (3, 5))).ravel().tolist()
    assert got == [as_python(position, words) for position in range(15)]


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_the_share_of_kept_elements_is_binomial(rate):
    shares = masks(folded(16), rate).mean(1)
    spread = (rate * (1 - rate) / N) ** 0.5
    assert (np.abs(shares - (1 - rate)) < SIGMAS * spread).all()
    assert abs(shares.mean() - (1 - rate)) < SIGMAS * spread / 4
    assert 0.5 * spread < shares.std() < 1.6 * spread  # neither too even nor too uneven


def test_rates_of_zero_and_one_keep_all_and_nothing():
    key = jax.random.key(0)
    assert keep_mask(key, 0.0, (N,)).all()
    assert not keep_mask(key, 1.0, (N,)).any()


def test_masks_of_neighbouring_keys_are_uncorrelated():
    by_step = masks(folded(16))
    for n in range(16):
        for other in range(n):
            assert correlation(by_step[n], by_step[other]) < SIGMAS
    raw = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [2, 0], [2**31, 0]], jnp.uint32)
    by_word = masks(jax.random.wrap_key_data(raw))  # keys that differ in a single bit
    for n in range(len(raw)):
        for other in range(n):
            assert correlation(by_word[n], by_word[other]) < SIGMAS


def test_neighbouring_positions_and_rows_are_uncorrelated():
    for mask in masks(folded(4), shape=(512, 128)):
        flat = mask.ravel()
        for shift in (1, 2, 3, 4, 8, 64, 128, 256, 4096, 32768):
            assert correlation(flat[shift:], flat[:-shift]) < SIGMAS
        column_means, row_means = mask.mean(0), mask.mean(1)
        assert (np.abs(column_means - 0.5) < SIGMAS * 0.5 / 512**0.5).all()
        assert (np.abs(row_means - 0.5) < SIGMAS * 0.5 / 128**0.5).all()


def test_a_bit_of_the_key_changes_half_of_the_bits():
    base = jax.random.key_data(jax.random.key(7))
    flips = [(word, bit) for word in range(2) for bit in range(32)]
    flipped = jnp.stack([base.at[word].set(base[word] ^ np.uint32(1 << b)) for word, b in flips])
    keys = jax.random.wrap_key_data(flipped)
    words = np.asarray(jax.vmap(lambda key: random_words(key, (1024,)))(keys))
    changed = np.bitwise_count(words ^ np.asarray(random_words(jax.random.key(7), (1024,))))
    shares = changed.mean(1) / 32
    assert abs(shares.mean() - 0.5) < 0.005
    assert (np.abs(shares - 0.5) < 0.02).all()


def test_bytes_are_uniform():
    words = np.asarray(jax.vmap(lambda key: random_words(key, (N,)))(folded(4)))
    for byte in range(4):
        counts = np.bincount(((words >> (8 * byte)) & 255).ravel(), minlength=256)
        expected = words.size / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < SIGMAS * (2 * 255) ** 0.5


def test_rows_do_not_depend_on_the_number_of_rows():
    key = jax.random.key(3)
    few, many = (np.asarray(keep_mask(key, 0.1, (rows, 4, 7))) for rows in (5, 8))
    np.testing.assert_array_equal(few, many[:5])


def test_a_lane_draws_what_it_draws_alone():
    keys = folded(3)
    together = jax.jit(jax.vmap(lambda key: keep_mask(key, 0.1, (64, 8))))(keys)
    for key, mask in zip(keys, together, strict=True):
        np.testing.assert_array_equal(mask, keep_mask(key, 0.1, (64, 8)))


def test_a_mask_of_too_many_elements_is_refused():
    with pytest.raises(LoraxError, match=r"dropout mask .* more than 2\^32"):
        jax.eval_shape(lambda key: keep_mask(key, 0.1, (2**20, 2**13)), jax.random.key(0))
