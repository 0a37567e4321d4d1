"""Small NNX models as strangers write them; none knows of LoRA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import lorax
from tests.helpers.lora import nnx_params, randomised


class Block(nnx.Module):
    """Attention by `nnx.MultiHeadAttention` (LinearGeneral) and an MLP of Linears."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, 12, out_features=8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class EinsumAttention(nnx.Module):
    """Gemma's style: heads by einsum, one kernel stacked over heads, an ellipsis."""

    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.Einsum("btd,dnh->btnh", (8, 2, 4), (2, 4), rngs=rngs)
        self.per_head = nnx.Einsum("btnh,nhe->btne", (2, 4, 4), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (2, 4, 8), (8,), rngs=rngs)
        self.gate = nnx.Einsum("...d,fd->...f", (8, 8), rngs=rngs)

    def __call__(self, x):
        return self.gate(self.out(nnx.tanh(self.per_head(self.query(x)))))


class TiedLanguageModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.mix = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(nnx.tanh(self.mix(self.embed(ids))))


class ConvNet(nnx.Module):
    """Two layers of one shape, strides, dilation and no bias."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.third = nnx.Conv(4, 6, (2, 2), kernel_dilation=2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.third(nnx.relu(self.second(nnx.relu(self.first(x)))))


class CausalConv(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.causal = nnx.Conv(4, 6, 3, padding="CAUSAL", rngs=rngs)
        self.circular = nnx.Conv(6, 4, 3, padding="CIRCULAR", rngs=rngs)

    def __call__(self, x):
        return self.circular(self.causal(x))


class Case(NamedTuple):
    """A model, an input for it, and the targets of an adapter."""

    build: Callable[[nnx.Rngs], nnx.Module]
    inputs: Any
    targets: Any

    def make(self) -> tuple[nnx.Module, Any, lorax.LoraSpec, Any]:
        """(model, params, spec, an adapter); all numbers are random, and nothing is compiled."""
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))
        model = nnx.merge(graphdef, randomised(shapes))
        params = nnx_params(model)
        axes = lorax.kernel_axes(model)
        spec = lorax.LoraSpec(2, alpha=3, targets=self.targets, kernel_axes=axes)
        lora = jax.eval_shape(lambda: lorax.init(jax.random.key(1), params, spec))
        return model, params, spec, randomised(lora)


def _sequential(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 5, rngs=rngs))


def _x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape)


CASES = {
    "transformer": Case(Transformer, _x(2, 5, 8), "all-linear"),
    "einsum": Case(EinsumAttention, _x(2, 5, 8), ("query", "per_head", "out", "gate")),
    "tied-embedding": Case(TiedLanguageModel, jnp.array([[1, 2, 10], [0, 0, 3]]), ("embed", "mix")),
    "conv": Case(ConvNet, _x(9, 9, 4), ("first", "second", "third")),
    "conv-1d": Case(CausalConv, _x(2, 7, 4), "all-linear"),
    "sequential": Case(_sequential, _x(3, 4), "all-linear"),
    "bare-linear": Case(lambda rngs: nnx.Linear(4, 5, rngs=rngs), _x(3, 4), "kernel"),
}
