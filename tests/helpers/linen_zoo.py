"""Small Linen models as strangers write them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import lorax
from tests.helpers.lora import randomised


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down", use_bias=False)(nn.gelu(nn.Dense(16, name="up")(x)))


class Classifier(nn.Module):
    """Ids -> embedding -> convolution -> a rematerialised block -> tied logits."""

    def setup(self):
        self.embed = nn.Embed(11, 8)
        self.conv = nn.Conv(8, (3,), padding="CAUSAL")
        self.blocks = [nn.remat(Block)()]
        self.einsum = nn.Einsum((8, 2, 4), "btd,dnh->btnh")
        self.merge_heads = nn.DenseGeneral(8, axis=(-2, -1))

    def __call__(self, ids):
        x = self.conv(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.merge_heads(nn.tanh(self.einsum(x))))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="first")(x))
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="second")(inputs=x))
        return nn.Dense(3, name="last")(x.reshape(*x.shape[:-3], -1))


class Case(NamedTuple):
    """A module, its input, the targets and their axes."""

    module: nn.Module
    inputs: Any
    targets: Any
    axes: Any

    def make(self) -> tuple[nn.Module, Any, Any, lorax.LoraSpec, Any]:
        """(module, x, variables, spec, an adapter); random, and nothing is compiled."""
        module, x, targets, axes = self
        variables = randomised(jax.eval_shape(module.init, jax.random.key(0), x))
        spec = lorax.LoraSpec(2, alpha=3, targets=targets, kernel_axes=axes)
        lora = jax.eval_shape(lambda: lorax.init(jax.random.key(1), variables["params"], spec))
        return module, x, variables, spec, randomised(lora)


ATTENTION = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}


def _x(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape)


CASES = {
    "attention": Case(Block(), _x(2, 5, 8), "qkvo", ATTENTION),
    "everything": Case(
        Classifier(),
        jnp.array([[1, 2, 10], [0, 0, 3]]),
        ("all-linear", "embed"),
        {**ATTENTION, "conv": "iio", "einsum": "ioo", "merge_heads": "iio"},
    ),
    "conv": Case(ConvNet(), _x(2, 9, 9, 4), "all-linear", {"first": "iiio", "second": "iiio"}),
    "bare conv": Case(nn.Conv(4, (3,)), _x(2, 6, 4), "kernel", {"kernel": "iio"}),
    "bare dense": Case(nn.Dense(4), _x(2, 6, 4), "kernel", ()),
}
