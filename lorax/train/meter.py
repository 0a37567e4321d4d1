"""The costs of a trial: time, memory, FLOPs."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lorax.runs.results import Costs
from lorax.runtime.compiler import StepCost
from lorax.runtime.memory import peak_device, peak_rss
from lorax.runtime.provenance import now

KEEP_STEPS = 128


@dataclass
class Meter:
    """Costs of one trial, filled in by the loop.

    Attributes:
      compile_seconds: time spent compiling the step, in all legs up to their last checkpoint.
      lanes: trials that the process trains together; time and compilation are shared evenly.
      most_lanes: largest number of lanes in all legs; in the result.
      began: when the first leg started, in UTC; None if the checkpoint does not record it.
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
        """The record for a checkpoint, so that a resumed trial reports the whole trial's costs."""
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
        """The meter of a trial that resumes; programs compiled again cost again."""
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
        """Record the seconds of a step, without compilation: the trial's share of them."""
        self.step_seconds.append(seconds / self.lanes)

    def share(self, lanes: int, since: float | None = None) -> None:
        """Share the process's time among `lanes` trials: from now on, or all since `since`."""
        if since is None:
            self.earlier_seconds, since = self.seconds, time.perf_counter()
        self.started, self.lanes = since, lanes
        self.most_lanes = max(lanes, self.most_lanes)

    def summary(self) -> Costs:
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
            "peak_device_bytes": peak_device(),
        }
