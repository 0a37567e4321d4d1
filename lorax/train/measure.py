"""What a trial cost: time, memory, FLOPs; and where it ran."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jaxlib.utils
import numpy as np

from lorax.process import PREPARED
from lorax.train.compiler import compiler_options
from lorax.train.provenance import code_commit, lorax_version, now, package_versions

KEEP_STEPS = 128
FATAL = 3  # of absl's levels of logging
_COMPILED: dict[Any, tuple["StepCost", Any]] = {}  # of this process, by function and shapes


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


@dataclass
class Meter:
    """Costs of one trial, filled in by the loop.

    Attributes:
      compile_seconds: time spent compiling the step, in all legs up to their last checkpoint.
      lanes: trials that the process trains together; time and compilation are shared evenly.
      most_lanes: of all legs: what the result tells.
      began: when the first leg started, in UTC; None of a checkpoint that does not say.
    """

    shapes: dict[int, StepCost] = field(default_factory=dict)
    earlier: dict[int, StepCost] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    steps_by_tokens: dict[int, int] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    compile_seconds: float = 0.0
    started: float = field(default_factory=lambda: time.perf_counter())  # noqa: PLW0108 (tests set the clock)
    lanes: int = 1
    most_lanes: int = 1
    began: str | None = field(default_factory=now)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed trial's costs are the whole trial's."""
        return {
            "shapes": {str(t): asdict(cost) for t, cost in (self.earlier | self.shapes).items()},
            "compile_seconds": self.compile_seconds,
            "most_lanes": self.most_lanes,
            "step_seconds": self.step_seconds[-KEEP_STEPS:],
            "steps_by_tokens": {str(t): n for t, n in self.steps_by_tokens.items()},
            "seconds": self.seconds,
            "began": self.began,
        }

    @classmethod
    def restore(cls, record: dict[str, Any]) -> "Meter":
        """The meter of a trial that goes on; programs compiled again cost again."""
        meter = cls(
            step_seconds=list(record["step_seconds"]),
            earlier_seconds=record["seconds"],
            compile_seconds=record["compile_seconds"],
            most_lanes=record["most_lanes"],
            began=record.get("began"),
        )
        meter.earlier = {int(t): StepCost(**cost) for t, cost in record["shapes"].items()}
        meter.steps_by_tokens = {int(t): n for t, n in record["steps_by_tokens"].items()}
        return meter

    @property
    def seconds(self) -> float:
        """Wall-clock time spent on the trial, in all its legs up to their last checkpoint."""
        return self.earlier_seconds + (time.perf_counter() - self.started) / self.lanes

    def count(self, tokens: int, cost: StepCost, is_new: bool) -> None:
        """Count a step on a batch of `tokens`; its program may have been compiled for it."""
        if is_new:
            self.compile_seconds += cost.compile_seconds / self.lanes
        self.shapes.setdefault(tokens, cost)
        self.steps_by_tokens[tokens] = self.steps_by_tokens.get(tokens, 0) + 1

    def add_step(self, seconds: float) -> None:
        """Note how long a step took, without compilation: the trial's share of it."""
        self.step_seconds.append(seconds / self.lanes)

    def share(self, lanes: int, since: float | None = None) -> None:
        """So many trials share the process's time: from now on, or in the whole leg `since`."""
        if since is None:
            self.earlier_seconds, since = self.seconds, time.perf_counter()
        self.started, self.lanes = since, lanes
        self.most_lanes = max(lanes, self.most_lanes)

    def summary(self) -> dict[str, Any]:
        """The costs, for `result.json`."""
        steps = sum(self.steps_by_tokens.values())
        shapes = self.earlier | self.shapes
        flops = sum(shapes[t].flops * n for t, n in self.steps_by_tokens.items())
        return {
            "seconds_per_step": float(np.median(self.step_seconds)) if self.step_seconds else None,
            "seconds_total": self.seconds,
            "compile_seconds": self.compile_seconds,
            "step_memory_bytes": max((cost.memory_bytes for cost in shapes.values()), default=0),
            "flops_per_step": flops / steps if steps else None,
            "steps_by_tokens": {str(t): n for t, n in sorted(self.steps_by_tokens.items())},
            "lanes": self.most_lanes,
            "peak_rss_bytes": peak_rss(),
            "peak_device_bytes": _peak_device(),
        }


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
    if key not in _COMPILED:
        start = time.perf_counter()
        with without_alarm():
            compiled = jitted.lower(*args).compile(compiler_options(keeps_barriers))
        seconds = time.perf_counter() - start
        flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
        _COMPILED[key] = StepCost(seconds, float(flops) / lanes, program_bytes(compiled)), compiled
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


def _shape_of(leaf: Any) -> Any:
    return (np.shape(leaf), leaf.dtype) if hasattr(leaf, "dtype") else leaf


def program_bytes(compiled: Any) -> int:
    """Arguments, results and temporaries of a compiled program, aliased ones counted once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(held - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


def reset_peak_rss() -> None:
    """Start a new measurement of the resident peak (Linux; elsewhere it is the process's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss() -> int:
    """Largest resident size of this process, in bytes, since `reset_peak_rss`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux, or a sandbox that leaves the line out
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_device() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def environment() -> dict[str, Any]:
    """What the figures were measured on, and by which versions."""
    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        **package_versions(),
        "lorax": lorax_version(),
        "commit": code_commit(),
        **PREPARED,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
