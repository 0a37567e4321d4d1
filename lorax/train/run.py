"""A run: a trial while it trains, its progress and its records."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lorax.config import TrialConfig
from lorax.metric_direction import signed
from lorax.runs.results import Evaluation, Pruned
from lorax.runs.trackers import FAILED, INTERRUPTED, Tracker
from lorax.runs.trial import Trial
from lorax.train.dataset import Dataset, epoch_steps, total_steps
from lorax.train.meter import Meter
from lorax.train.setup import Setup


@dataclass
class Progress:
    """A trial's progress: what a checkpoint keeps besides arrays.

    The step and the seed determine the next batch. `cut` records the step at which halving ended
    the trial, and the comparison that decided it.
    """

    step: int = 0
    best: Evaluation | None = None
    last: Evaluation | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    reason: str | None = None
    cut: Pruned | None = None


def _exit_code(fault: type[BaseException] | None) -> int:
    """The exit code that a tracker records for a trial that has not ended."""
    if fault is None:
        return 0
    return FAILED if issubclass(fault, Exception) else INTERRUPTED


@dataclass
class Run:
    """A trial while it trains, alone or in a lane of a pack.

    Attributes:
      trial: the trial.
      setup: its arrays at the start.
      dataset: its data.
      tracker: receives its records.
      best: the trainable part at the best evaluation, on the host.
      progress: its progress.
      meter: its costs.
      has_ended: its result is written; further results of its lane are ignored.
    """

    trial: Trial
    setup: Setup
    dataset: Dataset
    tracker: Tracker
    best: Any
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    has_ended: bool = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Close the tracker of a trial that has not ended; it continues elsewhere or later."""
        if not self.has_ended:
            self.tracker.close(_exit_code(kind))

    @property
    def config(self) -> TrialConfig:
        """The trial's config."""
        return self.trial.config

    @property
    def is_alive(self) -> bool:
        """Whether the trial continues."""
        p = self.progress
        return not (self.has_ended or p.reason or p.stopped_early or p.cut)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split."""
        return epoch_steps(self.config, self.dataset)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole trial."""
        return total_steps(self.config, self.dataset)

    @property
    def metric(self) -> str:
        """Name of the task's main metric."""
        return self.dataset.task.metrics[0]

    def settle(self, number: int, lr: float, loss: float) -> None:
        """Record the loss of a step, counted from 1; one that is not finite ends the trial."""
        point = {"step": number, "epoch": number / self.batches_per_epoch, "loss": loss}
        if not math.isfinite(loss):
            self.progress.reason = f"the loss is {loss} at step {number}"
            self.tracker.log({"kind": "diverged", **point})
        elif number % self.config.train.log_every == 0 or number == 1:
            self.tracker.log({"kind": "train", **point, "lr": lr})

    def evaluated(
        self,
        metrics: dict[str, float],
        trainable: Callable[[], Any],
        *,
        is_constant: bool = False,
    ) -> None:
        """Record an evaluation.

        Args:
          metrics: of `lorax.train.evaluation.score`.
          trainable: returns the trainable part on the host; called for a new best.
          is_constant: every example of the first dev split has the same prediction.
        """
        progress, value = self.progress, metrics[self.metric]
        point = {"step": progress.step, "epoch": progress.step / self.batches_per_epoch}
        is_finite = math.isfinite(value)
        self.tracker.log({"kind": "eval" if is_finite else "diverged", **point, **metrics})
        if not is_finite:
            progress.reason = f"the dev {self.metric} is {value} at step {progress.step}"
            return
        progress.last = {
            "step": progress.step,
            "epoch": progress.step / self.batches_per_epoch,
            "metrics": metrics,
        }
        if is_constant:
            progress.last["constant"] = True
        if signed(self.metric, value) > self.signed_best:
            progress.best, progress.evaluations_since_best = progress.last, 0
            self.best = trainable()
            return
        progress.evaluations_since_best += 1
        patience = self.config.train.early_stopping
        progress.stopped_early = bool(patience and progress.evaluations_since_best >= patience)

    @property
    def best_value(self) -> float | None:
        """The best value of the main metric; None before the first evaluation."""
        best = self.progress.best
        return best["metrics"][self.metric] if best else None

    @property
    def signed_best(self) -> float:
        """The best value, signed so that higher is better; minus infinity before the first."""
        value = self.best_value
        return -math.inf if value is None else signed(self.metric, value)

    def record(self) -> dict[str, Any]:
        """The JSON record for a checkpoint."""
        spec = self.setup.spec
        return {
            "progress": asdict(self.progress),
            "costs": self.meter.record(),
            "spec": asdict(spec) if spec else None,
            "content": asdict(self.setup.content),
        }
