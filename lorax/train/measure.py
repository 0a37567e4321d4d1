"""What a trial cost: time, memory, FLOPs; and where it ran."""

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

KEEP_STEPS = 128
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
      lanes: trials that the process trains together; time and compilation are shared evenly.
      most_lanes: of all legs: what the result tells.
    """

    shapes: dict[int, StepCost] = field(default_factory=dict)
    earlier: dict[int, StepCost] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    steps_by_length: dict[int, int] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    earlier_compile_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    lanes: int = 1
    most_lanes: int = 1

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed trial's costs are the whole trial's."""
        return {
            "shapes": {str(t): asdict(cost) for t, cost in (self.earlier | self.shapes).items()},
            "compile_seconds": self.compile_seconds,
            "most_lanes": self.most_lanes,
            "step_seconds": self.step_seconds[-KEEP_STEPS:],
            "steps_by_length": {str(t): n for t, n in self.steps_by_length.items()},
            "seconds": self.seconds,
        }

    @classmethod
    def restore(cls, record: dict[str, Any]) -> "Meter":
        """The meter of a trial that goes on; programs compiled again cost again."""
        meter = cls(
            step_seconds=list(record["step_seconds"]),
            earlier_seconds=record["seconds"],
            earlier_compile_seconds=record["compile_seconds"],
            most_lanes=record["most_lanes"],
        )
        meter.earlier = {int(t): StepCost(**cost) for t, cost in record["shapes"].items()}
        meter.steps_by_length = {int(t): n for t, n in record["steps_by_length"].items()}
        return meter

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling the step, in all legs up to their last checkpoint."""
        now = sum(cost.compile_seconds for cost in self.shapes.values())
        return self.earlier_compile_seconds + now

    @property
    def seconds(self) -> float:
        """Wall-clock time spent on the trial, in all its legs up to their last checkpoint."""
        return self.earlier_seconds + (time.perf_counter() - self.started) / self.lanes

    def count(self, length: int, cost: StepCost, is_new: bool) -> None:
        """Count a step on batches of `length` tokens; its program may have been compiled for it."""
        compile_seconds = cost.compile_seconds / self.lanes if is_new else 0.0
        if length not in self.shapes:
            self.shapes[length] = replace(cost, compile_seconds=compile_seconds)
        self.steps_by_length[length] = self.steps_by_length.get(length, 0) + 1

    def add_step(self, seconds: float) -> None:
        """Note how long a step took, without compilation: the trial's share of it."""
        self.step_seconds.append(seconds / self.lanes)

    def share(self, lanes: int) -> None:
        """From now on so many trials share the process's time."""
        self.earlier_seconds, self.started = self.seconds, time.perf_counter()
        self.lanes, self.most_lanes = lanes, max(lanes, self.most_lanes)

    def summary(self) -> dict[str, Any]:
        """The costs, for `result.json`."""
        steps = sum(self.steps_by_length.values())
        shapes = self.earlier | self.shapes
        flops = sum(shapes[t].flops * n for t, n in self.steps_by_length.items())
        return {
            "seconds_per_step": float(np.median(self.step_seconds)) if self.step_seconds else None,
            "seconds_total": self.seconds,
            "compile_seconds": self.compile_seconds,
            "step_memory_bytes": max((cost.memory_bytes for cost in shapes.values()), default=0),
            "flops_per_step": flops / steps if steps else None,
            "steps_by_length": {str(t): n for t, n in sorted(self.steps_by_length.items())},
            "lanes": self.most_lanes,
            "peak_rss_bytes": peak_rss(),
            "peak_device_bytes": _peak_device(),
        }


def compile_cost(
    jitted: Any, *args: Any, lanes: int = 1, as_new: bool = False
) -> tuple[StepCost, Any]:
    """Compile for the arguments' shapes, once a process.

    Asked again for the same shapes, it costs nothing and says so.

    Args:
      jitted: a jitted function that is made once a process.
      *args: its arguments.
      lanes: how many lanes' steps the program's FLOPs are counted for.
      as_new: tell what compiling took the first time.

    Returns:
      The cost, and the executable, which takes the arguments that are not static.
    """
    key = jitted, jax.tree.structure(args), *map(_shape_of, jax.tree.leaves(args))
    if key in _COMPILED:
        cost, compiled = _COMPILED[key]
        return cost if as_new else replace(cost, compile_seconds=0.0), compiled
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
    cost = StepCost(seconds, float(flops) / lanes, program_bytes(compiled))
    _COMPILED[key] = cost, compiled
    return cost, compiled


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
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _peak_device() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import version

    device = jax.devices()[0]
    return {
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        "lorax": version("lorax-flax"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
