"""LoRA in Flax NNX models: target layers are replaced by ones with a low-rank path.

Inside `jax.jit` the replacement happens while tracing and costs nothing when the program runs.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.errors import LoraxError
from lorax.lora import low_rank
from lorax.lora.adapter import LoraTree
from lorax.lora.layer_replacement import layer_axes, replace_layers
from lorax.lora.low_rank import Branch
from lorax.lora.merge import Scales, scales_of


class LoraParam(nnx.Param):  # type: ignore[type-arg]
    """An A or a B: filter by it before `nnx.Param`, of which it is a kind."""


class LoraScale(nnx.Variable):  # type: ignore[type-arg]
    """The factor on B A; never trained."""


class LoraLayer(nnx.Module):
    """A frozen layer and the low-rank path beside it, called as the layer was."""

    def __init__(self, base: Any, branch: Branch):
        self.base = base
        self.a = LoraParam(branch.a)
        self.b = LoraParam(branch.b)
        self.scale = LoraScale(jnp.asarray(branch.scale, jnp.float32))
        self.path = branch.path
        self.rate = branch.rate
        self.key = nnx.data(branch.key)

    @property
    def branch(self) -> Branch:
        """The low-rank path with its arrays."""
        return Branch(self.path, self.a[...], self.b[...], self.scale[...], self.rate, self.key)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with scale * B(A x) added."""
        if isinstance(self.base, nnx.Einsum) and (any(args) or kwargs.get("einsum_str")):
            raise LoraxError(f"{self.path!r}: give the einsum to the layer, not to its call")
        y = self.base(inputs, *args, **kwargs)
        return y + self.share(lambda x, branch: _low_rank(self.base, x, branch, y.dtype), inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """Of an embedding: logits over its rows, the adapter's share included."""
        logits = self.base.attend(query)
        return logits + self.share(low_rank.attend, query).astype(logits.dtype)

    def share(self, path: Callable[[jax.Array, Branch], jax.Array], x: jax.Array) -> jax.Array:
        """What a low-rank path adds to the layer's output."""
        return path(x, self.branch)


def _low_rank(base: Any, x: jax.Array, branch: Branch, dtype: Any) -> jax.Array:
    if isinstance(base, nnx.Embed):
        return low_rank.embed(x, branch, dtype)
    x = low_rank.drop(x.astype(dtype), branch)
    if isinstance(base, nnx.Linear):
        return low_rank.up(low_rank.down(x, branch), branch, (base.out_features,))
    if isinstance(base, nnx.Einsum):
        return low_rank.einsum(x, base.einsum_str, branch, base.kernel.shape)
    outputs = base.out_features if isinstance(base, nnx.LinearGeneral) else (base.out_features,)
    return low_rank.up(_narrow(base, branch)(x), branch, outputs)


def _narrow(base: Any, branch: Branch) -> Any:
    """The layer itself with A for its kernel: the same contraction, r outputs, no bias."""
    inputs = base.kernel.shape[: -_outputs(base)]
    twin = nnx.clone(base)
    twin.kernel = nnx.Param(branch.a.T.reshape(*inputs, -1))
    twin.bias, twin.use_bias = nnx.data(None), False
    return twin


def _outputs(layer: Any) -> int:
    return len(layer.out_features) if isinstance(layer, nnx.LinearGeneral) else 1


def adapt(
    model: nnx.Module,
    lora: LoraTree,
    spec: Scales,
    *,
    dropout: float | None = None,
    key: jax.Array | None = None,
) -> nnx.Module:
    """A copy of `model` that computes W x + scale * B(A x) on every target.

    The arrays are shared with `model`, which is left alone. Use it inside a jitted function on
    `nnx.merge(graphdef, base)`, with gradients taken with respect to `lora`; or as a model of
    its own, whose adapter is `nnx.state(model, LoraParam)`.

    Args:
      model: any NNX model of `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed` or `Conv`.
      lora: the adapter, of `init` on `nnx.to_pure_dict(nnx.state(model))`.
      spec: the LoraSpec, or each target's scale by path (which may be traced).
      dropout: rate on the input of A; None takes the spec's.
      key: PRNG key of the dropout; None for a deterministic model.

    Raises:
      LoraxError: a target that is not in the model, does not fit its layer, or is of a layer
        without a low-rank path; a key without a dropout rate.

    >>> from lorax.lora import LoraSpec, init
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> spec = LoraSpec(rank=2, targets="kernel")
    >>> lora = init(jax.random.key(1), nnx.to_pure_dict(nnx.state(model)), spec)
    >>> x = jnp.ones((1, 4))
    >>> bool((adapt(model, lora, spec)(x) == model(x)).all())
    True
    """
    rate = low_rank.rate_of(spec, dropout, key)
    factors = scales_of(lora, spec)

    def wrap(layer: Any, path: str) -> LoraLayer:
        pair = lora[path]
        return LoraLayer(layer, Branch(path, pair["a"], pair["b"], factors[path], rate, key))

    return replace_layers(model, lora, wrap)


def kernel_axes(model: nnx.Module) -> dict[str, str]:
    """`LoraSpec.kernel_axes` for every layer of `model` whose kernel is not a matrix.

    >>> model = nnx.Conv(3, 8, (5, 5), rngs=nnx.Rngs(0))
    >>> kernel_axes(model)
    {'kernel': 'iiio'}
    """
    found = {}
    for parts, layer in nnx.iter_graph(model):
        if not isinstance(layer, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv):
            continue
        path = ".".join([*map(str, parts), "kernel"])
        with contextlib.suppress(LoraxError):  # no low-rank path: refused if it is a target
            if (axes := layer_axes(layer, path)) != "io":
                found[path] = axes
    return found
