"""What several tests of the heart need."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import lorax

# Small programs that run once: LLVM's optimizing costs more than it saves.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def randomised(lora: Any, seed: int = 0, std: float = 0.3) -> Any:
    """An adapter of the same shapes whose A and B are both far from zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, std, x.shape), x.dtype), lora)


class Observed(NamedTuple):
    """What a model and its adapted and merged forms gave."""

    base: jax.Array
    fresh: jax.Array
    adapted: jax.Array
    merged: jax.Array
    gradient: Any
    gradient_of_merge: Any


def nnx_params(model: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_params(model: nnx.Module, params: dict[str, Any]) -> nnx.Module:
    """A copy of `model` with other parameters."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state, rest)


def merged_model(model: nnx.Module, lora: Any, spec: lorax.LoraSpec) -> nnx.Module:
    return with_params(model, lorax.merge(nnx_params(model), lora, spec))


def fresh(lora: Any, seed: int = 0) -> Any:
    """As `lorax.init` leaves it, A random and B zero, without a compilation."""
    pairs = randomised(lora, seed)
    return {path: {"a": p["a"], "b": jax.numpy.zeros_like(p["b"])} for path, p in pairs.items()}


def observe(base: Callable, adapted: Callable, merged: Callable, lora: Any) -> Observed:
    """Runs the three in one compiled program: outputs, and gradients with respect to `lora`."""

    def program(lora, start):
        y, pullback = jax.vjp(adapted, lora)
        y_merged, pullback_merged = jax.vjp(merged, lora)
        (by_adapter,) = pullback(jax.numpy.cos(y_merged))
        (by_merge,) = pullback_merged(jax.numpy.cos(y_merged))
        return Observed(base(), adapted(start), y, y_merged, by_adapter, by_merge)

    return quick_jit(program)(randomised(lora), fresh(lora))


def assert_close(left: Any, right: Any, tol: float = 1e-5) -> None:
    """Trees of one structure, equal to a share `tol` of each leaf's largest number."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a64, b64, rtol=0, atol=tol * max(1.0, np.abs(b64).max()))


def assert_bit_equal(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype
