"""One transformer block, one adapter, all three ways in, and a reference in plain NumPy."""

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import lorax
from tests.helpers.lora import assert_close, quick_jit, randomised

HEADS, D, FF, T = 2, 8, 12, 5


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, D, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, FF, rngs=rngs)
        self.down = nnx.Linear(FF, D, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x + self.attention(x))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x)
        return nn.Dense(D, name="down")(nn.tanh(nn.Dense(FF, name="up")(x)))


def function(params, x, np=jax.numpy):
    """The block as any function of a pytree; with NumPy it is the reference."""
    attention = params["attention"]
    q, k, v = (
        np.einsum("btd,dnh->btnh", x, attention[n]["kernel"]) + attention[n]["bias"][None, None]
        for n in ("query", "key", "value")
    )
    weights = np.exp(np.einsum("btnh,bsnh->bnts", q, k) / (D / HEADS) ** 0.5)
    mixed = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    out = attention["out"]
    x = x + np.einsum("btnh,nhd->btd", mixed, out["kernel"]) + out["bias"][None, None]
    hidden = np.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None, None])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None, None]


def adapted_by_hand(params, lora, alpha, ranks):
    """Every kernel with alpha / r * (B A)^T added, in float64."""

    def double(tree):
        return {k: double(v) if isinstance(v, dict) else np.float64(v) for k, v in tree.items()}

    params = double(params)
    for path, pair in lora.items():
        *parents, leaf = path.split(".")
        owner = params
        for name in parents:
            owner = owner[name]
        a, b = np.float64(pair["a"]), np.float64(pair["b"])
        assert a.shape[0] == ranks[parents[-1]]
        owner[leaf] = owner[leaf] + alpha / a.shape[0] * (b @ a).T.reshape(owner[leaf].shape)
    return params


def test_nnx_linen_and_merge_agree_with_numpy():
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: NnxBlock(nnx.Rngs(0))))
    state = randomised(shapes)
    params = nnx.to_pure_dict(state)
    model = nnx.merge(graphdef, state)
    spec = lorax.LoraSpec(
        2,
        alpha=5,
        targets="all-linear",
        rank_pattern={"value": 3, "up": 1},
        kernel_axes=lorax.kernel_axes(model),
    )
    lora = randomised(jax.eval_shape(lambda: lorax.init(jax.random.key(0), params, spec)))
    assert len(lora) == 6
    x = jax.random.normal(jax.random.key(1), (3, T, D))

    @quick_jit
    def three_ways(lora):
        return (
            lorax.adapt(model, lora, spec)(x),
            lorax.linen_apply(LinenBlock(), {"params": params}, lora, spec, x),
            function(lorax.merge(params, lora, spec), x),
        )

    ranks = {"query": 2, "key": 2, "value": 3, "out": 2, "up": 1, "down": 2}
    by_hand = adapted_by_hand(params, lora, 5, ranks)
    expected = function(by_hand, np.float64(x), np)
    assert np.abs(expected - function(params, np.float64(x), np)).max() > 0.1
    for y in three_ways(lora):
        assert_close(y, expected)
