"""The low-rank path scale * B(A x), beside a frozen layer: no merged kernel, no frozen dW."""

from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.lora.dropout import keep_mask
from lorax.lora.paths import module_path


class Branch(NamedTuple):
    """One target's low-rank path: A (r, d_in), B (d_out, r), and the dropout on A's input."""

    path: str
    a: jax.Array
    b: jax.Array
    scale: Any
    rate: float = 0.0
    key: jax.Array | None = None


def drop(x: jax.Array, branch: Branch) -> jax.Array:
    """Inverted dropout; nothing without a key. Each target draws its own."""
    if branch.key is None or branch.rate == 0.0:
        return x
    key = jax.random.fold_in(branch.key, crc32(branch.path.encode()))
    keep = keep_mask(key, branch.rate, x.shape)
    return jnp.where(keep, x / (1 - branch.rate), 0)


def down(x: jax.Array, branch: Branch) -> jax.Array:
    """A x: (..., d_in) -> (..., r)."""
    return jnp.einsum("...i,ri->...r", x, branch.a.astype(x.dtype))


def up(h: jax.Array, branch: Branch, out_shape: tuple[int, ...]) -> jax.Array:
    """Scale * B h: (..., r) -> (..., *out_shape)."""
    y = _times(h, (branch.b * branch.scale).astype(h.dtype))
    return y.reshape(*y.shape[:-1], *out_shape)


@jax.custom_vjp
def _times(h: jax.Array, b: jax.Array) -> jax.Array:
    """B h: (..., r) -> (..., o).

    JAX's own gradient of B multiplies by the outputs' gradient turned over, which XLA then copies
    on a CPU: as much memory as the layer's outputs. Here the few columns of h are turned instead.
    """
    return jnp.einsum("...r,or->...o", h, b)


def _times_forward(h: jax.Array, b: jax.Array) -> Any:
    return jnp.einsum("...r,or->...o", h, b), (h, b)


def _times_backward(kept: Any, grad: jax.Array) -> Any:
    h, b = kept
    rows_h, rows_grad = h.reshape(-1, h.shape[-1]), grad.reshape(-1, grad.shape[-1])
    b_grad = jax.lax.dot_general(rows_h, rows_grad, (((0,), (0,)), ((), ())))
    return jnp.einsum("...o,or->...r", grad, b), b_grad.T


_times.defvjp(_times_forward, _times_backward)


def embed(ids: jax.Array, branch: Branch, dtype: Any) -> jax.Array:
    """The rows of scale * (B A)^T that `ids` look up."""
    h = jnp.take(branch.a.astype(dtype), ids, axis=1)
    return up(jnp.moveaxis(h, 0, -1), branch, (branch.b.shape[0],))


def attend(query: jax.Array, branch: Branch) -> jax.Array:
    """The adapter's share of an embedding's logits: query (..., d) -> (..., vocabulary)."""
    h = query @ (branch.b * branch.scale).astype(query.dtype)
    return h @ branch.a.astype(query.dtype)


def rate_of(spec: Any, dropout: float | None, key: jax.Array | None) -> Any:
    """The dropout rate: as given, or the spec's.

    Raises:
      LoraxError: a rate outside [0, 1), or a key without any rate (a mapping of scales has none).
    """
    if dropout is None:
        dropout = getattr(spec, "dropout", None)
    if dropout is None and key is not None:
        raise LoraxError("a dropout key needs a rate: scales by path have none, so pass dropout=")
    rate = dropout or 0.0
    if not 0.0 <= rate < 1.0:
        raise LoraxError(f"dropout={rate!r} is not in [0, 1)")
    return rate


def einsum_axes(equation: str, path: str) -> str:
    """The axes of the kernel in `x,kernel->y`: i, o or b, as `kernel_axes` has them.

    >>> einsum_axes("btd,dnh->btnh", "query")
    'ioo'
    """
    inputs, kernel, output = _parts(equation)
    kinds = {(True, False): "i", (False, True): "o", (True, True): "b"}
    axes = [kinds.get((c in inputs, c in output)) for c in kernel]
    if "..." in kernel or None in axes:
        raise LoraxError(f"the einsum {equation!r} of {path!r} is not one that LoRA can factor")
    return "".join(str(axis) for axis in axes)


def einsum(x: jax.Array, equation: str, branch: Branch, shape: tuple[int, ...]) -> jax.Array:
    """The low-rank path of `einsum(equation, x, kernel)` for a kernel of `shape`."""
    inputs, kernel, output = _parts(equation)
    kinds = list(zip(einsum_axes(equation, branch.path), kernel, shape, strict=True))
    stacked, into, out = ("".join(c for kind, c, _ in kinds if kind == k) for k in "bio")
    n_stacked, n_into, n_out = (tuple(n for kind, _, n in kinds if kind == k) for k in "bio")
    rank = next(c for c in "rsuvwz" if c not in equation)
    r = branch.a.shape[-2]
    a = branch.a.reshape(*n_stacked, r, *n_into).astype(x.dtype)
    b = (branch.b * branch.scale).reshape(*n_stacked, *n_out, r).astype(x.dtype)
    hidden = "".join(c for c in output if c not in out) + rank
    h = jnp.einsum(f"{inputs},{stacked}{rank}{into}->{hidden}", x, a)
    return jnp.einsum(f"{hidden},{stacked}{out}{rank}->{output}", h, b)


def unsupported(path: str, layer: Any) -> LoraxError:
    """The error for a target whose layer has no low-rank path."""
    return LoraxError(
        f"{module_path(path)!r} is a {type(layer).__name__}, which has no low-rank path; "
        "adapt a linear, einsum, embedding or convolution layer (without groups, batch axes or "
        "a mask), or use lorax.merge"
    )


def _parts(equation: str) -> tuple[str, str, str]:
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    return inputs, kernel, output
