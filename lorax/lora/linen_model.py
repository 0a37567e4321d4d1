"""The way in for Flax Linen models: a method interceptor adds the low-rank path."""

from typing import Any

import jax
from flax import linen as nn

from lorax.errors import LoraxError
from lorax.lora import low_rank
from lorax.lora.adapter import LoraTree
from lorax.lora.low_rank import Branch
from lorax.lora.merge import Scales, check_fit, scales_of
from lorax.lora.spec import LoraSpec


def linen_apply(
    module: nn.Module,
    variables: dict[str, Any],
    lora: LoraTree,
    spec: Scales,
    *args: Any,
    dropout: float | None = None,
    key: jax.Array | None = None,
    **kwargs: Any,
) -> Any:
    """`module.apply(variables, *args, **kwargs)` with scale * B(A x) added on every target.

    Args:
      module: any Linen model of `Dense`, `DenseGeneral`, `Einsum`, `Embed` or `Conv`.
      variables: as of `module.init`; left alone.
      lora: the adapter, of `init` on `variables["params"]`.
      spec: the LoraSpec, or each target's scale by path (which may be traced).
      *args: the module's own.
      dropout: rate on the input of A; None takes the spec's.
      key: PRNG key of the dropout; None for a deterministic model.
      **kwargs: the module's own.

    Raises:
      LoraxError: a target of a layer without a low-rank path, one that does not fit its layer
        or that the module never called; a key without a dropout rate.

    >>> import jax.numpy as jnp
    >>> from lorax.lora import LoraSpec, init
    >>> module, x = nn.Dense(3), jnp.ones((1, 4))
    >>> variables = module.init(jax.random.key(0), x)
    >>> spec = LoraSpec(rank=2, targets="kernel")
    >>> lora = init(jax.random.key(1), variables["params"], spec)
    >>> bool((linen_apply(module, variables, lora, spec, x) == module.apply(variables, x)).all())
    True
    """
    factors = scales_of(lora, spec)
    rate = low_rank.rate_of(spec, dropout, key)
    met: set[str] = set()
    inside: list[str] = []

    def interceptor(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        layer = context.module
        path = _path(layer)
        y = call(*inputs, **options)
        if path not in lora or inside or context.method_name not in ("__call__", "attend"):
            return y
        met.add(path)
        inside.append(path)  # the narrow twin of a layer is a call too, and not to be adapted
        branch = Branch(path, lora[path]["a"], lora[path]["b"], factors[path], rate, key)
        x = inputs[0] if inputs else next(iter(options.values()))
        try:
            _check_layer(layer, branch)
            if context.method_name == "attend":
                return y + low_rank.attend(x, branch).astype(y.dtype)
            return y + _low_rank(layer, x, branch, y.dtype)
        finally:
            inside.pop()

    with nn.intercept_methods(interceptor):
        out = module.apply(variables, *args, **kwargs)
    if missed := sorted(set(lora) - met):
        raise LoraxError(f"the adapter's target {missed[0]!r} was never called by the module")
    return out


def _path(layer: nn.Module) -> str:
    leaf = "embedding" if isinstance(layer, nn.Embed) else "kernel"
    return ".".join([*layer.path, leaf])


def _check_layer(layer: Any, branch: Branch) -> None:
    axes = _layer_axes(layer, branch.path)
    name = "embedding" if isinstance(layer, nn.Embed) else "kernel"
    kernel = nn.meta.unbox(layer.get_variable("params", name))
    rules = LoraSpec(kernel_axes={branch.path: axes})
    check_fit({branch.path: kernel}, {branch.path: {"a": branch.a, "b": branch.b}}, rules)


def _layer_axes(layer: Any, path: str) -> str:
    if isinstance(layer, nn.Dense | nn.Embed):
        return "io"
    if isinstance(layer, nn.Einsum) and layer.einsum_str:
        return low_rank.einsum_axes(layer.einsum_str, path)
    if isinstance(layer, nn.DenseGeneral) and not _as_tuple(layer.batch_dims):
        return "i" * len(_as_tuple(layer.axis)) + "o" * len(_as_tuple(layer.features))
    if isinstance(layer, nn.Conv) and layer.feature_group_count == 1 and layer.mask is None:
        return "i" * (len(_as_tuple(layer.kernel_size)) + 1) + "o"
    raise low_rank.unsupported(path, layer)


def _low_rank(layer: Any, x: jax.Array, branch: Branch, dtype: Any) -> jax.Array:
    if isinstance(layer, nn.Embed):
        return low_rank.embed(x, branch, dtype)
    x = low_rank.drop(x.astype(dtype), branch)
    if isinstance(layer, nn.Dense):
        return low_rank.up(low_rank.down(x, branch), branch, (layer.features,))
    if isinstance(layer, nn.Einsum):
        return low_rank.einsum(x, str(layer.einsum_str), branch, tuple(layer.shape))
    if isinstance(layer, nn.DenseGeneral):
        inputs = tuple(x.shape[axis] for axis in _as_tuple(layer.axis))
    else:
        inputs = (*_as_tuple(layer.kernel_size), x.shape[-1])
    narrow = layer.clone(features=branch.a.shape[0], use_bias=False, parent=None, name=None)
    h = narrow.apply({"params": {"kernel": branch.a.T.reshape(*inputs, -1)}}, x)
    return low_rank.up(h, branch, _as_tuple(layer.features))


def _as_tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
