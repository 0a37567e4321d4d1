import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraSpec, init
from lorax.lora.initializers import INITIALIZERS
from tests.helpers.lora import assert_bit_equal, assert_close, quick_jit

pytestmark = pytest.mark.slow

KEY = jax.random.key(3)
compiled_init = quick_jit(init, static_argnums=2)


def base(d=24):
    return {n: {"kernel": jnp.zeros((d, 16))} for n in ("query", "key", "value")}


def draw(spec, tree=None, key=KEY):
    return compiled_init(key, tree if tree is not None else base(), spec)


def test_an_adapter_is_fp32_whatever_the_base_and_the_x64_flag():
    with jax.enable_x64(True):
        table = {"embedding": jnp.zeros((9, 4), jnp.bfloat16)}
        for name in INITIALIZERS:
            spec = LoraSpec(2, targets=("q", "table"), init=name)
            lora = draw(spec, {**base(), "table": table})
            assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}


def test_b_is_zero_and_a_is_not():
    for pair in draw(LoraSpec(4, targets="qkv")).values():
        assert not pair["b"].any()
        assert pair["a"].all()


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
def test_a_smaller_rank_is_the_first_rows_of_a_larger_one(name):
    small = draw(LoraSpec(4, targets="q", init=name))["query.kernel"]["a"]
    large = draw(LoraSpec(16, targets="q", init=name))["query.kernel"]["a"]
    factor = 4 / 16 if name == "gaussian" else 1
    np.testing.assert_allclose(small * factor, large[:4], rtol=1e-6)


def test_nested_ranks_hold_in_stacked_kernels_and_embeddings():
    tree = {"blocks": jnp.zeros((3, 24, 16)), "table": {"embedding": jnp.zeros((30, 16))}}

    def at(rank):
        spec = LoraSpec(rank, targets=("blocks", "table"), kernel_axes={"blocks": "bio"})
        return draw(spec, tree)

    small, large = at(4), at(16)
    assert_bit_equal(small["blocks"]["a"], large["blocks"]["a"][:, :4])
    assert_bit_equal(small["table.embedding"]["b"], large["table.embedding"]["b"][:, :4])


def test_a_draw_does_not_depend_on_the_other_targets():
    alone = draw(LoraSpec(4, targets="v"))
    among = draw(LoraSpec(4, targets="qkv"))
    assert_bit_equal(alone["value.kernel"], among["value.kernel"])


def test_targets_of_one_shape_get_different_draws():
    lora = draw(LoraSpec(4, targets="qkv"))
    a = [np.asarray(pair["a"]) for pair in lora.values()]
    assert not any(np.intersect1d(a[i], a[j]).size for i in range(3) for j in range(i))


def test_conv_layers_of_one_shape_get_different_draws():
    tree = {"layers": [{"conv": {"kernel": jnp.zeros((3, 3, 4, 8))}} for _ in range(2)]}
    lora = draw(LoraSpec(4, targets="conv", kernel_axes={"conv": "iiio"}), tree)
    first, second = (np.asarray(pair["a"]) for pair in lora.values())
    assert first.shape == (4, 36)
    assert not np.intersect1d(first, second).size


def test_stacked_layers_get_different_draws():
    a = draw(LoraSpec(2, targets="blocks", kernel_axes={"blocks": "bio"}), stacked())["blocks"]["a"]
    assert len({row.tobytes() for row in np.asarray(a)}) == 6


@pytest.mark.parametrize("path", [f"module_{i}" for i in range(6)])
def test_any_path_hashes_to_a_valid_key(path):
    assert draw(LoraSpec(2, targets=path), {path: jnp.zeros((4, 4))})[path]["a"].any()


def test_the_draw_follows_the_key():
    spec = LoraSpec(4, targets="q")
    assert_bit_equal(draw(spec), draw(spec))
    other = draw(spec, key=jax.random.key(4))
    assert not np.intersect1d(draw(spec)["query.kernel"]["a"], other["query.kernel"]["a"]).size


def test_legacy_keys_and_jit_give_the_same_draw():
    spec = LoraSpec(4, targets="q")
    assert_bit_equal(draw(spec), draw(spec, key=jax.random.PRNGKey(3)))
    assert_close(draw(spec), init(KEY, base(), spec), tol=1e-7)


def test_shapes_are_enough():
    spec = LoraSpec(4, targets="qkv")
    assert_bit_equal(init(KEY, base(), spec), init(KEY, jax.eval_shape(base), spec))


def stacked():
    return {"blocks": jnp.zeros((6, 400, 300))}


@pytest.mark.parametrize(("name", "bound"), [("kaiming_uniform", 1.0), ("he_uniform", 6**0.5)])
def test_stacked_kernels_have_the_std_of_one_layer(name, bound):
    spec = LoraSpec(8, targets="blocks", kernel_axes={"blocks": "bio"}, init=name)
    a = np.asarray(draw(spec, stacked())["blocks"]["a"])
    assert a.shape == (6, 8, 400)
    bound /= math.sqrt(400)
    assert bound * 0.99 < np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(("axes", "d_in"), [("iiio", 3 * 3 * 16), ("iio", 48), ("ioo", 16)])
def test_the_bound_counts_every_input_axis(axes, d_in):
    shape = {"iiio": (3, 3, 16, 32), "iio": (3, 16, 48), "ioo": (16, 4, 12)}[axes]
    lora = draw(LoraSpec(16, targets="w", kernel_axes={"w": axes}), {"w": jnp.zeros(shape)})
    a = np.abs(np.asarray(lora["w"]["a"]))
    assert a.shape == (16, d_in)
    assert 0.95 / math.sqrt(d_in) < a.max() <= 1 / math.sqrt(d_in)


def test_an_embedding_draws_b_and_its_stacked_axes_too():
    tree = {"table": {"embedding": jnp.zeros((3, 50, 40))}}
    lora = draw(LoraSpec(8, targets="table", kernel_axes={"table": "bio"}), tree)
    pair = lora["table.embedding"]
    assert jax.tree.map(jnp.shape, pair) == {"a": (3, 8, 50), "b": (3, 40, 8)}
    assert not pair["a"].any()
    assert np.asarray(pair["b"]).std() == pytest.approx(1, rel=0.1)
