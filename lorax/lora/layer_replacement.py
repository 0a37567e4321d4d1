"""Layer replacement: a copy of an NNX model with other layers in place of its own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from lorax.errors import LoraxError
from lorax.lora import low_rank
from lorax.lora.merge import check_fit
from lorax.lora.spec import LoraSpec


def replace_layers(
    model: nnx.Module, lora: Mapping[str, Any], wrap: Callable[[Any, str], nnx.Module]
) -> nnx.Module:
    """A copy of `model` with `wrap(layer, path)` in the place of every target's layer.

    Args:
      model: any NNX model; its arrays are shared.
      lora: of arrays or shape structs; every pair has to fit its layer.
      wrap: makes a module that is called as the layer was.
    """
    model = nnx.clone(model)
    shared = [[list(map(str, path)) for path in group] for group in nnx.find_duplicates(model)]
    for path, pair in lora.items():
        model = _replace(model, path, pair, wrap, shared)
    return model


def _replace(
    model: nnx.Module,
    path: str,
    pair: Any,
    wrap: Callable[[Any, str], nnx.Module],
    shared: list[list[list[str]]],
) -> nnx.Module:
    *parents, leaf = path.split(".")
    layer = _walk(model, parents, path)
    axes = layer_axes(layer, path)
    if leaf != (name := "embedding" if isinstance(layer, nnx.Embed) else "kernel"):
        raise LoraxError(f"the adapter's target {path!r} is not its layer's {name!r}")
    _check_layer(layer, axes, path, pair)
    adapted = wrap(layer, path)
    if not parents:
        return adapted
    for *owners, name in _aliases(shared, parents, leaf):
        _set_child(_walk(model, owners, path), name, adapted)
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


def _check_layer(layer: Any, axes: str, path: str, pair: Any) -> None:
    kernel = layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel
    if len(kernel.shape) != len(axes):
        raise LoraxError(
            f"{path!r} of shape {kernel.shape} is stacked by a transform (nnx.vmap), "
            "which adapt cannot see into; use lorax.merge"
        )
    shaped = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)  # the kernel may be quantized
    check_fit({path: shaped}, {path: pair}, LoraSpec(kernel_axes={path: axes}))


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
