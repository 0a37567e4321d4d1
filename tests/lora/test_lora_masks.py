from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings

from lorax import LoraSpec, LoraxError, combine, init, mask_of, split, trainable_mask

PROFILE = settings.get_profile("lora")


class Pair(NamedTuple):
    left: Any
    value: Any


TREES = st.recursive(
    st.integers() | st.none(),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


@settings(PROFILE, max_examples=200)
@given(TREES, st.data())
def test_combine_undoes_split_on_any_tree(tree, data):
    leaves, structure = jax.tree.flatten(tree)
    assume(leaves)
    bits = data.draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    assume(any(bits))
    trainable, frozen = split(tree, jax.tree.unflatten(structure, bits))
    assert jax.tree.leaves(trainable) == [x for x, bit in zip(leaves, bits, strict=True) if bit]
    assert jax.tree.leaves(frozen) == [x for x, bit in zip(leaves, bits, strict=True) if not bit]
    for joined in (combine(trainable, frozen), combine(frozen, trainable)):
        assert joined == tree
        assert jax.tree.structure(joined) == structure


def test_a_mask_that_trains_nothing_is_refused():
    with pytest.raises(LoraxError, match="trains nothing"):
        split({"a": 1, "b": [2]}, {"a": False, "b": [False]})


@pytest.mark.parametrize("mask", [{"a": True}, {"a": True, "b": True}, [True, [False]], True])
def test_a_mask_of_another_structure_is_refused(mask):
    with pytest.raises(LoraxError, match="another structure"):
        split({"a": 1, "b": [2]}, mask)


BASE = {
    "query": {"kernel": jnp.zeros((4, 4))},
    "head": {"dense": {"kernel": jnp.zeros((4, 4))}, "out": {"kernel": jnp.zeros((4, 2))}},
    "heads": jnp.zeros(3),
    "pair": Pair(jnp.zeros(1), jnp.zeros(1)),
}


def params(spec):
    return {"base": BASE, "lora": init(jax.random.key(0), BASE, spec)}


def trained(mask):
    flat = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, on in flat if on}


def test_the_adapter_and_the_saved_modules_are_trained():
    spec = LoraSpec(2, targets="q", modules_to_save=("head.out", "pair.value"))
    assert trained(trainable_mask(params(spec), spec)) == {
        "base.head.out.kernel",
        "base.pair.value",
        "lora.query.kernel.a",
        "lora.query.kernel.b",
    }


def test_a_module_means_everything_below_it_and_nothing_beside_it():
    assert trained(mask_of(BASE, ["head"])) == {"head.dense.kernel", "head.out.kernel"}


@pytest.mark.parametrize("name", ["hea", "query.bias", "nothing"])
def test_a_saved_module_that_matches_nothing_is_refused(name):
    with pytest.raises(LoraxError, match=f"module '{name}' matches nothing.* has: head"):
        trainable_mask(params(LoraSpec(2, targets="q")), LoraSpec(2, modules_to_save=(name,)))


@pytest.mark.parametrize("tree", [{"base": BASE}, {"base": BASE, "lora": {}}, {"lora": {"w": 1}}])
def test_params_without_a_base_or_an_adapter_are_refused(tree):
    with pytest.raises(LoraxError, match=r"'base'.*'lora'.*lorax\.init"):
        trainable_mask(tree, LoraSpec())
