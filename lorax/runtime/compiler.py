"""Compiles a step, once a process for each shape, and reports what it costs."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jaxlib.utils
import numpy as np

log = logging.getLogger(__name__)
FATAL = 3  # of absl's levels of logging
_COMPILED: dict[Any, tuple["StepCost", Any]] = {}  # of this process, by function and shapes
_LOCKS: dict[Any, threading.Lock] = {}
Options = dict[str, str | bool]
# On a CPU, XLA of jaxlib 0.10 gathers products and what surrounds them into large graphs of its
# library YNNPACK, which compute much twice. Products alone go there instead.
CPU: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
# It drops barriers early there, too: what was to be computed again is then shared, and kept.
CPU_BARRIERS: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"}


@dataclass
class StepCost:
    """The compiled step of one batch shape, as XLA reports it.

    Attributes:
      compile_seconds: of the program, however many lanes it computes.
      flops: of one lane's step.
      memory_bytes: arguments, results and temporaries of the whole program.
    """

    compile_seconds: float
    flops: float
    memory_bytes: int


def compile_cost(
    jitted: Any,
    *args: Any,
    lanes: float = 1,
    is_trained: bool = True,
    keeps_barriers: bool = False,
) -> tuple[StepCost, Any]:
    """Compile for the arguments' shapes, once a process.

    Asked again for the same shapes, it costs nothing; the first who trains with it is told what
    compiling took, the others 0.

    Args:
      jitted: a jitted function that is made once a process.
      *args: its arguments.
      lanes: how many lanes' steps the program's FLOPs are counted for.
      keeps_barriers: see `compiler_options`.
      is_trained: False for who only plans, and is told in any case.

    Returns:
      The cost, and the executable, which takes the arguments that are not static.
    """
    shapes = map(_shape_of, jax.tree.leaves(args))
    key = jitted, jax.tree.structure(args), *_numerics(), *shapes
    with _LOCKS.setdefault(key, threading.Lock()):  # another thread may be compiling it
        if key not in _COMPILED:
            start = time.perf_counter()
            with without_alarm():
                compiled = jitted.lower(*args).compile(compiler_options(keeps_barriers))
            seconds = time.perf_counter() - start
            flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
            cost = StepCost(seconds, float(flops) / lanes, program_bytes(compiled))
            _COMPILED[key] = cost, compiled
        cost, compiled = _COMPILED[key]
        if is_trained:
            _COMPILED[key] = replace(cost, compile_seconds=0.0), compiled
    return cost, compiled


@contextlib.contextmanager
def without_alarm() -> Iterator[None]:
    """Keep XLA's own log off the terminal while a program is compiled.

    XLA reports a compilation of more than two minutes as an error, and asks to file a bug: packs
    on a busy machine take as long. A compilation that fails raises.
    """
    shown = int(os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"))  # JAX's default
    set_level = getattr(jaxlib.utils, "absl_set_min_log_level", lambda level: None)
    set_level(FATAL)
    try:
        yield
    finally:
        set_level(shown)


def compiled_programs() -> int:
    """How many programs this process has compiled by `compile_cost`."""
    return len(_COMPILED)


def _numerics() -> tuple[Any, ...]:
    """What else of JAX's configuration a program's numbers depend on."""
    names = ("default_matmul_precision", "enable_x64", "numpy_dtype_promotion", "debug_nans")
    return tuple(getattr(jax.config, f"jax_{name}") for name in names)


def shapes_of(tree: Any) -> Any:
    """The tree with shapes in the place of its arrays, which may be donated meanwhile."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def _shape_of(leaf: Any) -> Any:
    return (np.shape(leaf), leaf.dtype) if hasattr(leaf, "dtype") else leaf


def program_bytes(compiled: Any) -> int:
    """Arguments, results and temporaries of a compiled program, aliased ones counted once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(held - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


@cache
def compiler_options(keeps_barriers: bool = False) -> Options:
    """Options for the default backend; none where XLA does not know them.

    Args:
      keeps_barriers: what `jax.checkpoint` computes again is computed again, as on accelerators.
    """
    if jax.default_backend() != "cpu":
        return {}
    wanted = [CPU, CPU_BARRIERS] if keeps_barriers else [CPU]
    return {name: value for part in wanted if _is_known(part) for name, value in part.items()}


def _is_known(options: Options) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except Exception as fault:  # an XLA of another version: the error's type is not documented
        log.warning("XLA does not take %s: %s", options, str(fault).splitlines()[0])
        return False
    return True
