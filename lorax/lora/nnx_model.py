"""The way in for Flax NNX models: target layers are swapped for ones with a low-rank path.

Inside `jax.jit` the swap happens while tracing and costs nothing when the program runs.
"""

import contextlib
from collections.abc import Mapping
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

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with scale * B(A x) added."""
        if isinstance(self.base, nnx.Einsum) and (any(args) or kwargs.get("einsum_str")):
            raise LoraxError(f"{self.path!r}: give the einsum to the layer, not to its call")
        y = self.base(inputs, *args, **kwargs)
        return y + _low_rank(self.base, inputs, self.branch, y.dtype)

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

    >>> from lorax.lora.adapter import init
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> spec = LoraSpec(rank=2, targets="kernel")
    >>> lora = init(jax.random.key(1), nnx.to_pure_dict(nnx.state(model)), spec)
    >>> x = jnp.ones((1, 4))
    >>> bool((adapt(model, lora, spec)(x) == model(x)).all())
    True
    """
    rate = low_rank.rate_of(spec, dropout, key)
    factors = scales_of(lora, spec)
    model = nnx.clone(model)
    shared = [[list(map(str, path)) for path in group] for group in nnx.find_duplicates(model)]
    for path, pair in lora.items():
        branch = Branch(path, pair["a"], pair["b"], factors[path], rate, key)
        model = _swap(model, branch, shared)
    return model


def _swap(model: nnx.Module, branch: Branch, shared: list[list[list[str]]]) -> nnx.Module:
    *parents, leaf = branch.path.split(".")
    layer = _walk(model, parents, branch.path)
    axes = layer_axes(layer, branch.path)
    _check_layer(layer, axes, branch)
    adapted = LoraLayer(layer, branch)
    if not parents:
        return adapted
    for *owners, name in _aliases(shared, parents, leaf):
        _set_child(_walk(model, owners, branch.path), name, adapted)
    return model


def _aliases(shared: list[list[list[str]]], parents: list[str], leaf: str) -> list[list[str]]:
    """Every path of a layer: a module may be called from several places."""
    for group in shared:
        if [*parents, leaf] in group:
            names = [".".join(path) for path in group]
            raise LoraxError(f"{names} are one array in different layers; use lorax.merge")
    return next((group for group in shared if parents in group), [parents])


def _walk(node: Any, names: list[str], path: str) -> Any:
    for name in names:
        try:
            node = _child(node, name)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            raise LoraxError(f"the adapter's target {path!r} is not in the model") from None
    return node


def _child(node: Any, name: str) -> Any:
    if isinstance(node, Mapping):
        return node[name] if name in node else node[int(name)]
    return node[int(name)] if name.isdigit() else getattr(node, name)


def _set_child(node: Any, name: str, child: nnx.Module) -> None:
    if isinstance(node, Mapping):
        node[name if name in node else int(name)] = child  # type: ignore[index]
    elif name.isdigit():
        node[int(name)] = child
    else:
        setattr(node, name, child)


def _check_layer(layer: Any, axes: str, branch: Branch) -> None:
    kernel = layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel
    if len(kernel.shape) != len(axes):
        raise LoraxError(
            f"{branch.path!r} of shape {kernel.shape} is stacked by a transform (nnx.vmap), "
            "which adapt cannot see into; use lorax.merge"
        )
    rules = LoraSpec(kernel_axes={branch.path: axes})
    shaped = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)  # the kernel may be quantized
    check_fit({branch.path: shaped}, {branch.path: {"a": branch.a, "b": branch.b}}, rules)


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
    if isinstance(layer, nnx.Conv) and layer.feature_group_count == 1 and layer.mask is None:
        return "i" * (len(layer.kernel_size) + 1) + "o"
    raise low_rank.unsupported(path, layer)


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
