from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lorax import LoraSpec, LoraxError, resolve


def layer():
    return {
        "attention": {n: {"kernel": jnp.zeros((8, 8))} for n in ("query", "key", "value", "out")},
        "up": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)},
        "down": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)},
        "norm": {"scale": jnp.zeros(8)},
    }


BASE = {
    "embed": {"embedding": jnp.zeros((20, 8))},
    "head": {"out": {"kernel": jnp.zeros((8, 2))}},
    "layers": [layer(), layer(), layer()],
}


def modules(spec, base=BASE):
    return [path.removesuffix(".kernel") for path in resolve(base, spec)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("qv", {"attention.query", "attention.value"}),
        ("vq", {"attention.query", "attention.value"}),
        (("k", "o"), {"attention.key", "attention.out"}),
        ("mlp", {"up", "down"}),
        ("attention.out", {"attention.out"}),
        (r"layers\.\d+\.(up|attention\.key)", {"up", "attention.key"}),
    ],
)
def test_targets_by_group_name_and_regex(targets, expected):
    found = modules(LoraSpec(2, targets=targets))
    assert found == [m for m in found if m.startswith("layers.")]
    for i in range(3):
        here = {m.removeprefix(f"layers.{i}.") for m in found if m.startswith(f"layers.{i}.")}
        assert here == expected


def test_all_linear_leaves_out_embeddings_and_the_head():
    found = modules(LoraSpec(2, targets="all-linear"))
    assert len(found) == 3 * 6
    assert not any("head" in m or "embed" in m for m in found)


def test_all_linear_leaves_out_biases_that_have_two_axes():
    heads = {"kernel": jnp.zeros((8, 2, 4)), "bias": jnp.zeros((2, 4))}
    spec = LoraSpec(2, targets="all-linear", kernel_axes={"query": "ioo"})
    assert list(resolve({"query": heads, "norm": {"scale": jnp.zeros((2, 8))}}, spec)) == [
        "query.kernel"
    ]


@pytest.mark.parametrize("exclude", ["attention.value", "v", r".*\.value"])
def test_excluded_modules_are_named_like_targets(exclude):
    assert modules(LoraSpec(2, targets="qv", exclude=exclude)) == modules(LoraSpec(2, targets="q"))


def test_layers_keep_only_those():
    found = modules(LoraSpec(2, targets="q", layers=(0, 2)))
    assert found == ["layers.0.attention.query", "layers.2.attention.query"]


def test_fields_of_a_named_tuple_are_names_even_value():
    class Attention(NamedTuple):
        query: jax.Array
        value: jax.Array

    base = {"attention": Attention(jnp.zeros((4, 4)), jnp.zeros((4, 4)))}
    assert list(resolve(base, LoraSpec(2, targets="qv"))) == ["attention.query", "attention.value"]


@pytest.mark.parametrize(
    ("values", "offender"),
    [
        ({"targets": "nothing_here"}, "lora.targets='nothing_here'"),
        ({"targets": ("query", "nothing_here")}, "lora.targets='nothing_here'"),
        ({"targets": "uery"}, "lora.targets='uery'"),
        ({"exclude": ("nothing_here",)}, "lora.exclude='nothing_here'"),
        ({"rank_pattern": {"nothing_here": 2}}, "lora.rank_pattern 'nothing_here'"),
        ({"rank_pattern": {"up": 2}}, "lora.rank_pattern 'up'"),
        ({"alpha_pattern": {"nothing_here": 2}}, "lora.alpha_pattern 'nothing_here'"),
        ({"layers": (1, 3)}, "lora.layers has [3]"),
        ({"layers": ()}, "lora.layers is empty"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(values, offender):
    with pytest.raises(LoraxError) as caught:
        resolve(BASE, LoraSpec(2, **values))
    assert offender in str(caught.value)


def test_every_letter_of_a_group_must_match():
    base = {"query": {"kernel": jnp.zeros((8, 8))}, "value": {"kernel": jnp.zeros((8, 8))}}
    assert len(resolve(base, LoraSpec(2, targets="qv"))) == 2
    with pytest.raises(LoraxError, match=r"lora\.targets='o' matches no kernel"):
        resolve(base, LoraSpec(2, targets="qvo"))


def test_the_error_says_what_there_is_and_what_was_meant():
    with pytest.raises(LoraxError) as caught:
        resolve(BASE, LoraSpec(2, targets="qeury"))
    message = str(caught.value)
    assert "did you mean 'query'?" in message
    assert "value" in message
    assert "all-linear" in message


def test_excluding_every_target_is_refused():
    with pytest.raises(LoraxError, match="leaves no target"):
        resolve(BASE, LoraSpec(2, targets="q", exclude="query"))


def test_layers_of_a_base_without_layers_are_refused():
    with pytest.raises(LoraxError, match="layers of the targets are none"):
        resolve({"query": {"kernel": jnp.zeros((8, 8))}}, LoraSpec(2, targets="q", layers=(0,)))


def test_rank_above_the_smaller_side_is_refused_and_equal_to_it_is_not():
    assert resolve(BASE, LoraSpec(8, targets="mlp"))
    with pytest.raises(LoraxError, match=r"rank 9 is above min\(d_in, d_out\) = 8.*from 1 to 8"):
        resolve(BASE, LoraSpec(9, targets="mlp"))
    with pytest.raises(LoraxError, match="rank 9"):
        resolve(BASE, LoraSpec(4, targets="mlp", rank_pattern={"up": 9}))


def test_a_kernel_of_more_axes_must_be_described():
    base = {"query": {"kernel": jnp.zeros((8, 2, 4))}}
    with pytest.raises(LoraxError, match=r"kernel_axes=\{'query'"):
        resolve(base, LoraSpec(2, targets="q"))
    for wrong in ("io", "iii", "ooo", "ixo", "iooo"):
        with pytest.raises(LoraxError, match=r"do not describe 'query\.kernel'"):
            resolve(base, LoraSpec(2, targets="q", kernel_axes={"query": wrong}))
    assert resolve(base, LoraSpec(2, targets="q", kernel_axes={"query": "ioo"}))
