"""The way in for Flax NNX models: target layers are swapped for ones with a low-rank path.

Inside `jax.jit` the swap happens while tracing and costs nothing when the program runs.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.errors import LoraxError
from lorax.lora import low_rank
from lorax.lora.adapter import LoraTree
from lorax.lora.low_rank import Branch
from lorax.lora.merge import Scales, check_fit, scales_of
from lorax.lora.spec import LoraSpec


class LoraParam(nnx.Param):
    """An A or a B: filter by it before `nnx.Param`, of which it is a kind."""


class LoraScale(nnx.Variable):
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

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with scale * B(A x) added."""
        y = self.base(x, *args, **kwargs)
        return y + _low_rank(self.base, x, self.branch, y.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """Of an embedding: logits over its rows, the adapter's share included."""
        logits = self.base.attend(query)
        return logits + low_rank.attend(query, self.branch).astype(logits.dtype)


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
    twin.bias = nnx.data(None)
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
        without a low-rank path.

    >>> from lorax.lora.adapter import init
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> spec = LoraSpec(rank=2, targets="kernel")
    >>> lora = init(jax.random.key(1), nnx.to_pure_dict(nnx.state(model)), spec)
    >>> x = jnp.ones((1, 4))
    >>> bool((adapt(model, lora, spec)(x) == model(x)).all())
    True
    """
    rate = dropout if dropout is not None else getattr(spec, "dropout", 0.0)
    factors = scales_of(lora, spec)
    model = nnx.clone(model)
    for path, pair in lora.items():
        branch = Branch(path, pair["a"], pair["b"], factors[path], rate, key)
        model = _swap(model, branch)
    return model


def _swap(model: nnx.Module, branch: Branch) -> nnx.Module:
    *parents, _ = branch.path.split(".")
    owner = _walk(model, parents[:-1], branch.path)
    layer = _walk(owner, parents[-1:], branch.path)
    _check_layer(layer, branch)
    adapted = LoraLayer(layer, branch)
    if not parents:
        return adapted
    if parents[-1].isdigit():
        owner[int(parents[-1])] = adapted
    elif isinstance(owner, dict):
        owner[parents[-1]] = adapted
    else:
        setattr(owner, parents[-1], adapted)
    return model


def _walk(node: Any, names: list[str], path: str) -> Any:
    for name in names:
        try:
            is_item = name.isdigit() or isinstance(node, dict)
            node = node[int(name) if name.isdigit() else name] if is_item else getattr(node, name)
        except (AttributeError, KeyError, IndexError, TypeError):
            raise LoraxError(f"the adapter's target {path!r} is not in the model") from None
    return node


def _check_layer(layer: Any, branch: Branch) -> None:
    rules = LoraSpec(kernel_axes={branch.path: layer_axes(layer, branch.path)})
    kernel = layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel
    check_fit({branch.path: kernel[...]}, {branch.path: {"a": branch.a, "b": branch.b}}, rules)


def layer_axes(layer: Any, path: str) -> str:
    """Which axes of a layer's kernel are inputs (i), outputs (o) or stacked (b).

    Raises:
      LoraxError: a layer that has no low-rank path.
    """
    if isinstance(layer, nnx.Linear | nnx.Embed):
        return "io"
    if isinstance(layer, nnx.Einsum):
        return low_rank.einsum_axes(layer.einsum_str, path)
    if isinstance(layer, nnx.LinearGeneral) and not layer.batch_axis:
        return "i" * len(layer.in_features) + "o" * len(layer.out_features)
    if isinstance(layer, nnx.Conv) and layer.feature_group_count == 1:
        return "i" * (len(layer.kernel.shape) - 1) + "o"
    raise low_rank.unsupported(path, layer)


def kernel_axes(model: nnx.Module) -> dict[str, str]:
    """`LoraSpec.kernel_axes` for every layer of `model` whose kernel is not a matrix.

    >>> model = nnx.Conv(3, 8, (5, 5), rngs=nnx.Rngs(0))
    >>> kernel_axes(model)
    {'kernel': 'iiio'}
    """
    found = {}
    for path, layer in _layers(model):
        axes = layer_axes(layer, path)
        if axes != "io":
            found[path] = axes
    return found


def _layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    for parts, node in nnx.iter_graph(model):
        if isinstance(node, nnx.LinearGeneral) and node.batch_axis:
            continue
        if isinstance(node, nnx.Conv) and node.feature_group_count != 1:
            continue
        if isinstance(node, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Conv):
            yield ".".join([*map(str, parts), "kernel"]), node
