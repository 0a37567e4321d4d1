"""Compiles a step, once per process and shape, and reports its cost."""

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
FATAL = 3  # a log level of absl
_COMPILED: dict[Any, tuple["StepCost", Any]] = {}  # by function and shapes
_LOCKS: dict[Any, threading.Lock] = {}
Options = dict[str, str | bool]
# On a CPU, XLA of jaxlib 0.10 fuses matrix products and the operations around them into large
# YNNPACK graphs, which recompute much of the work. This option sends single products there.
CPU: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
# XLA also drops barriers early on a CPU: values to be rematerialized would be shared and kept.
CPU_BARRIERS: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"}


@dataclass
class StepCost:
    """The compiled step of one batch shape, as XLA reports it.

    Attributes:
      compile_seconds: of the program, whatever its number of lanes.
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
    """(cost, executable) for the arguments' shapes; compiled once per process.

    Later calls with the same shapes return the cached program. The first call that trains gets
    the compile time in its cost, and later ones get 0.

    Args:
      jitted: a jitted function that is made once per process.
      *args: its arguments.
      lanes: number of lanes that the program's FLOPs cover.
      keeps_barriers: see `compiler_options`.
      is_trained: False for a caller that only plans; it never resets the compile time.

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
    """Keep XLA's own log off the terminal while a program compiles.

    XLA logs a compilation of over two minutes as an error and asks for a bug report, but packs on
    a busy machine may take that long. A compilation that fails still raises.
    """
    shown = int(os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1"))  # JAX's default
    set_level = getattr(jaxlib.utils, "absl_set_min_log_level", lambda level: None)
    set_level(FATAL)
    try:
        yield
    finally:
        set_level(shown)


def compiled_programs() -> int:
    """Number of programs that this process has compiled by `compile_cost`."""
    return len(_COMPILED)


def _numerics() -> tuple[Any, ...]:
    """The settings of JAX that a program's numbers depend on."""
    names = ("default_matmul_precision", "enable_x64", "numpy_dtype_promotion", "debug_nans")
    return tuple(getattr(jax.config, f"jax_{name}") for name in names)


def shapes_of(tree: Any) -> Any:
    """The tree with shapes in place of its arrays, which may be donated later."""
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
      keeps_barriers: `jax.checkpoint` really recomputes values, as on accelerators.
    """
    if jax.default_backend() != "cpu":
        return {}
    wanted = [CPU, CPU_BARRIERS] if keeps_barriers else [CPU]
    return {name: value for part in wanted if _is_known(part) for name, value in part.items()}


def _is_known(options: Options) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(options)
    except Exception as fault:  # another version of XLA; the error's type is undocumented
        log.warning("XLA does not take %s: %s", options, str(fault).splitlines()[0])
        return False
    return True
