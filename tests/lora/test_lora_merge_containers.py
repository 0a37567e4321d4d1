"""Any pytree of kernels: the same adapter paths whatever holds the arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from lorax import LoraSpec, init, merge
from tests.helpers.lora import assert_close, randomised

W = jax.random.normal(jax.random.key(0), (6, 6))


class Attention(NamedTuple):
    query: jax.Array
    value: jax.Array


class Model(nnx.Module):
    def __init__(self):
        self.query = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.value = nnx.Linear(6, 6, rngs=nnx.Rngs(0))


def boxed():
    init_fn = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    tree = {}
    for name in ("query", "value"):
        tree[name] = nn.Dense(6, kernel_init=init_fn).init(jax.random.key(0), W)["params"]
    return tree


BASES = {
    "dict": {"query": {"kernel": W}, "value": {"kernel": W}},
    "flat names": {"layers.0.query.weight": W, "layers.0.value.weight": W},
    "list of dicts": [{"query": W}, {"value": W}],
    "tuple": ({"query": W, "value": W}, 1.0),
    "named tuple": Attention(W, W),
    "named tuple inside": {"attention": [Attention(W, W)]},
    "FrozenDict": freeze({"query": {"kernel": W}, "value": {"kernel": W}}),
    "nnx.State": nnx.state(Model()),
    "partitioned": boxed(),
}


@pytest.mark.parametrize("name", BASES)
def test_targets_are_found_and_only_they_change(name):
    base, spec = BASES[name], LoraSpec(2, targets="qv", alpha=4)
    lora = randomised(init(jax.random.key(1), base, spec))
    assert len(lora) == 2
    merged = merge(base, lora, spec)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    changes = [
        new - old
        for old, new in zip(jax.tree.leaves(base), jax.tree.leaves(merged), strict=True)
        if jnp.shape(old) == (6, 6)
    ]
    for change, pair in zip(changes, lora.values(), strict=True):
        assert_close(change, 2 * (pair["b"] @ pair["a"]).T)


def test_nnx_and_linen_boxes_have_no_name_of_their_own():
    spec = LoraSpec(2, targets="qv")
    for name in ("nnx.State", "partitioned", "dict", "FrozenDict"):
        assert list(init(jax.random.key(1), BASES[name], spec)) == ["query.kernel", "value.kernel"]
