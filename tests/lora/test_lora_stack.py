"""Trees of unlike sizes in one, and each of them back again."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

import lorax
from lorax.lora import stack, union, unstack
from lorax.lora.paths import leaves_by_path
from tests.helpers.lora import assert_bit_equal

PROFILE = settings.get_profile("lora")
SIZES = {"layers.0.query.kernel": (3, 4), "layers.0.value.kernel": (3, 3), "blocks.out": (5, 2)}
STACKED = {"blocks.out": (2,)}  # one kernel for all blocks, as scanned models have them


def adapter(ranks, seed=0):
    """Random factors for the targets that have a rank."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for path, rank in ranks.items():
        axes, (d_in, d_out) = STACKED.get(path, ()), SIZES[path]
        shapes = {"a": (*axes, rank, d_in), "b": (*axes, d_out, rank)}
        pairs[path] = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return pairs


ADAPTERS = st.lists(
    st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 6), max_size=3),
    min_size=1,
    max_size=4,
)


@settings(PROFILE)
@given(ADAPTERS)
def test_unstack_undoes_stack_and_all_else_is_zero(ranks):
    adapters = [adapter(r, seed) for seed, r in enumerate(ranks)]
    stacked = stack(adapters, union(adapters))
    for n, one in enumerate(adapters):
        assert_bit_equal(unstack(stacked, n, one), one)
        assert_bit_equal(unstack(leaves_by_path(stacked), n, one), one)
    # A random number is never zero: what is not zero came from an adapter.
    for name, leaf in leaves_by_path(stacked).items():
        assert leaf.shape[0] == len(adapters)
        own = [leaves_by_path(one).get(name) for one in adapters]
        counts = [0 if x is None else x.size for x in own]
        assert np.count_nonzero(leaf.reshape(len(adapters), -1), axis=1).tolist() == counts


@settings(PROFILE)
@given(ADAPTERS)
def test_the_union_is_the_smallest_that_holds_every_adapter(ranks):
    largest = union([adapter(r) for r in ranks])
    widest = {}
    for path in {path for r in ranks for path in r}:
        widest[path] = max(r.get(path, 0) for r in ranks)
    assert jax.tree.map(lambda x: x.shape, largest) == jax.tree.map(
        lambda x: x.shape, adapter(widest)
    )
    # Of unions, and of shapes alone, it is the same.
    again = union([union([adapter(r)]) for r in reversed(ranks)])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), again) == jax.tree.map(
        lambda x: (x.shape, x.dtype), largest
    )


@settings(PROFILE, max_examples=10)
@given(ADAPTERS)
def test_a_stacked_adapter_is_the_padded_one(ranks):
    """Along ranks a stack pads as `lorax.pad` does, at the ends."""
    adapters = [adapter(r, seed) for seed, r in enumerate(ranks)]
    like = union(adapters)
    stacked = stack(adapters, like)
    for n, one in enumerate(adapters):
        for path, pair in one.items():
            rank = like[path]["a"].shape[-2]
            padded = lorax.pad({path: pair}, rank)[path]
            assert_bit_equal({k: stacked[path][k][n] for k in pair}, padded)


def test_trees_of_any_kind_are_stacked_scalars_and_none_included():
    trees = [{"step": np.int32(n), "inner": [np.full(2, n, np.float64), None]} for n in (3, 4)]
    stacked = stack(trees, trees[0])
    assert stacked["step"].tolist() == [3, 4] and stacked["step"].dtype == np.int32
    assert stacked["inner"][0].tolist() == [[3, 3], [4, 4]] and stacked["inner"][1] is None
    assert_bit_equal(unstack(stacked, 1, trees[1]), trees[1])


def test_a_stack_is_of_the_types_of_its_place_and_owns_its_memory():
    tree = {"w": np.ones(2, np.float32)}
    stacked = stack([tree], {"w": jax.ShapeDtypeStruct((2,), np.float16)})
    assert stacked["w"].dtype == np.float16
    stacked["w"][:] = 7
    assert tree["w"].tolist() == [1, 1]


def test_bf16_leaves_come_back_to_the_bit():
    tree = {"w": jax.numpy.asarray([1.5, -2.25], jax.numpy.bfloat16)}
    back = unstack(stack([tree, tree], tree), 1, tree)
    assert back["w"].dtype == jax.numpy.bfloat16
    assert back["w"].tolist() == [1.5, -2.25]


def test_what_has_no_place_or_does_not_fit_is_refused():
    small, large = adapter({"blocks.out": 2}), adapter({"blocks.out": 3})
    with pytest.raises(lorax.LoraxError, match=r"'blocks.out.a' of shape \(2, 3, 5\) does not fit"):
        stack([small, large], small)
    with pytest.raises(lorax.LoraxError, match="'odd' has no place in the stack"):
        stack([{"odd": np.zeros(1)}], small)
    with pytest.raises(lorax.LoraxError, match=r"'w' of shape \(1, 1\) does not fit into \(2,\)"):
        stack([{"w": np.zeros((1, 1))}], {"w": np.zeros(2)})
    stacked = stack([small], small)
    with pytest.raises(lorax.LoraxError, match=r"'odd' is not in the stack"):
        unstack(stacked, 0, {"odd": np.zeros(1)})
    with pytest.raises(
        lorax.LoraxError,
        match=r"'blocks.out.a' has shape \(2, 2, 5\) in the stack, not \(2, 3, 5\)",
    ):
        unstack(stacked, 0, large)


def test_a_scalar_does_not_stand_for_an_array():
    with pytest.raises(lorax.LoraxError, match=r"'w' of shape \(\) does not fit into \(2,\)"):
        stack([{"w": np.float32(1)}], {"w": np.zeros(2)})
    with pytest.raises(lorax.LoraxError, match="not"):
        unstack({"w": np.zeros((1, 2, 3))}, 0, {"w": np.zeros(2)})


def test_a_lane_that_is_not_there_is_an_error():
    tree = {"w": np.ones(2)}
    with pytest.raises((IndexError, lorax.LoraxError)):
        unstack(stack([tree, tree], tree), 2, tree)
