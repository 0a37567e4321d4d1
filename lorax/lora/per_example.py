"""Per-example adapters: a batch whose rows use different adapters of one base."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.errors import LoraxError
from lorax.lora.adapter_stack import Adapters
from lorax.lora.layer_replacement import replace_layers
from lorax.lora.low_rank import Branch
from lorax.lora.nnx_model import LoraLayer


class LoraRows(nnx.Variable):  # type: ignore[type-arg]
    """Which adapter each row of a batch uses, (B,); the layers of a model share one."""


class PerExampleLayer(LoraLayer):
    """A frozen layer and, beside it, each row's own low-rank path, gathered from a stack."""

    def __init__(self, base: Any, branch: Branch, rows: LoraRows):
        super().__init__(base, branch)
        self.rows = rows

    def share(self, path: Callable[[jax.Array, Branch], jax.Array], x: jax.Array) -> jax.Array:
        """What the low-rank path of each row's adapter adds to that row."""
        rows_B = self.rows[...]
        _check_input(self.base, x.shape, len(rows_B), self.path)

        def row(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
            # Layers want an axis of rows, if only of one.
            return path(x[None], Branch(self.path, a, b, scale))[0]

        factors = (_of_rows(leaf[...], rows_B) for leaf in (self.a, self.b, self.scale))
        return jax.vmap(row)(x, *factors)


def _of_rows(slots: jax.Array, rows_B: jax.Array) -> jax.Array:
    """(K, ...) -> (B, ...): zero for the row -1, NaN for others outside of the stack."""
    index_B = jnp.where(rows_B < 0, len(slots), rows_B)  # a negative index counts from the end
    picked = jnp.take(slots, index_B, axis=0, mode="fill", fill_value=jnp.nan)
    is_plain = (rows_B == -1).reshape(-1, *(1,) * (slots.ndim - 1))
    return jnp.where(is_plain, jnp.zeros_like(picked), picked)


def adapt_rows(model: nnx.Module, adapters: Adapters, rows_B: Any) -> nnx.Module:
    """A copy of `model` that computes each row of a batch with an adapter of its own.

    A row is an index of the first axis of the inputs: sequences packed into one row share its
    adapter. Adapters and rows are data: inside a jitted function that takes them as arguments,
    other rows, another adapter in a slot (`Adapters.replace`) or another alpha need no new
    program. Dropout is off. Gradients with respect to `adapters` are each adapter's own.

    A target's factors are gathered, B r (d_in + d_out) numbers while its layer computes, and
    multiply the rows in two batched products, as many as one adapter of the stack's rank takes.

    Args:
      model: any NNX model that `adapt` serves; left alone, its arrays are shared.
      adapters: of `stack_adapters`.
      rows_B: ints (B,): which adapter each row uses, from 0 to K - 1; -1 for the plain base.

    Raises:
      LoraxError: rows that name no adapter (where they are traced, such rows give NaN); a target
        that is not in the model or does not fit; when the model is called, a target whose input
        is not one of B rows (a table of positions that all rows share; several first tokens of
        packed rows).

    >>> from lorax.lora.adapter_stack import stack_adapters
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> lora = {"kernel": {"a": jnp.ones((1, 3)), "b": jnp.ones((2, 1))}}
    >>> pool = stack_adapters([(lora, {"kernel": 1.0}), (lora, {"kernel": 2.0})])
    >>> x = jnp.ones((3, 3))
    >>> (adapt_rows(model, pool, [1, -1, 0])(x) - model(x)).round(4).tolist()
    [[6.0, 6.0], [0.0, 0.0], [3.0, 3.0]]
    """
    rows = LoraRows(_checked_rows(rows_B, len(adapters)))

    def wrap(layer: Any, path: str) -> PerExampleLayer:
        if isinstance(layer, nnx.Einsum):
            _check_einsum(layer.einsum_str, path)
        pair, scale = adapters.lora[path], adapters.scales[path]
        return PerExampleLayer(layer, Branch(path, pair["a"], pair["b"], scale), rows)

    return replace_layers(model, adapters.slot, wrap)


def _checked_rows(rows_B: Any, count: int) -> jax.Array:
    if not isinstance(rows_B, jax.core.Tracer):
        rows = np.asarray(rows_B)
        if rows.ndim == 1 and rows.dtype.kind in "iu":
            outside = rows[(rows < -1) | (rows >= count)]
            if outside.size:
                raise LoraxError(
                    f"rows_B has {outside[0]}; the stack's adapters are 0 to {count - 1}, and -1 "
                    "is the plain base"
                )
    rows_B = jnp.asarray(rows_B)
    if rows_B.ndim != 1 or not jnp.issubdtype(rows_B.dtype, jnp.integer):
        raise LoraxError(f"rows_B is {rows_B.dtype}{rows_B.shape}, not ints of shape (B,)")
    return rows_B.astype(jnp.int32)


def _check_einsum(equation: str, path: str) -> None:
    """The rows are the first axis of the input and of the output, and none of the kernel."""
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    if inputs[0] != output[0] or inputs[0] in kernel:
        raise LoraxError(
            f"the einsum {equation!r} of {path!r} does not keep its first axis, which are the rows"
        )


def _check_input(layer: Any, shape: tuple[int, ...], rows: int, path: str) -> None:
    if not shape or shape[0] != rows or not _has_rows(layer, len(shape)):
        raise LoraxError(
            f"{path!r} is called with an input of shape {shape}, which is not one of {rows} rows: "
            "leave it out of the adapters, or run each adapter alone"
        )


def _has_rows(layer: Any, ndim: int) -> bool:
    """Whether an input of so many axes has one before those that the layer works on."""
    if isinstance(layer, nnx.LinearGeneral):
        return all(axis % ndim for axis in layer.axis)
    if isinstance(layer, nnx.Conv):
        return ndim > len(layer.kernel_size) + 1
    if isinstance(layer, nnx.Einsum):
        inputs = layer.einsum_str.split(",")[0].replace(" ", "")
        return ndim > len(inputs.replace("...", "")) - (not inputs.startswith("..."))
    return ndim > 1  # ids of one axis are as likely positions, which all rows share
