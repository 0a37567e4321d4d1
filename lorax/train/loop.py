"""The training loop of one trial: steps, evaluations, checkpoints."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from lorax import data
from lorax.checkpoint import Checkpoints
from lorax.config import TrialConfig
from lorax.tracking import Tracker
from lorax.train.measure import Meter
from lorax.train.metrics import evaluate
from lorax.train.optimizer import Hyper
from lorax.train.schedule import lr_factor
from lorax.train.setup import Dataset, Setup, hyper_of
from lorax.train.step import State, example_losses, predict, train_step


@dataclass
class Progress:
    """Where a trial stands: what a checkpoint keeps besides arrays.

    `epoch` and `position` (batches done in it) are the data position; with the seed they give
    the next batch.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    reason: str | None = None

    def advance(self, batches_per_epoch: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.epoch, self.position = divmod(self.step, batches_per_epoch)


@dataclass
class Loop:
    """A trial while it runs.

    Attributes:
      state: donated to every step, so it is replaced, never shared.
      best: the trainable part at the best evaluation.
    """

    config: TrialConfig
    dataset: Dataset
    setup: Setup
    checkpoints: Checkpoints
    tracker: Tracker
    state: State
    best: Any
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split."""
        return math.ceil(len(self.dataset.train) / self.config.train.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole trial."""
        train = self.config.train
        return train.max_steps or train.epochs * self.batches_per_epoch

    def run(self, bar: Any) -> Progress:
        """Train from where the progress stands to the end.

        Args:
          bar: a progress bar with `update` and `set_postfix`.
        """
        if self.progress.stopped_early:  # and killed before the result was written
            return self.progress
        o = self.config.optimizer
        factor = lr_factor(o.schedule, self.total_steps, o.warmup_ratio)
        pending: tuple[int, float, jax.Array] | None = None
        clock = time.perf_counter()
        for batch in self._batches():
            hyper = hyper_of(self.config, factor(self.progress.step))
            compiling = self._compile(hyper, batch)
            self.state, loss = train_step(
                self.setup.program, self.state, self.setup.frozen, hyper, batch
            )
            previous, pending = pending, (self.progress.step, float(hyper.lr), loss)
            if previous and not self._settle(*previous, bar):
                break
            self.progress.advance(self.batches_per_epoch)
            due = self._due()
            if due and not self._settle(*pending, bar):
                break
            now = time.perf_counter()
            if not compiling and previous:
                self.meter.step_seconds.append(now - clock)
            if due:
                pending = None
                self._pause(due)
                if self.progress.stopped_early or self.progress.reason:
                    break
            clock = time.perf_counter()
        return self.progress

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches still to come; a pure function of the seed and the position."""
        train = self.config.train
        encoded, dataset = self.dataset.train, self.dataset
        while self.progress.step < self.total_steps:
            epoch, position = self.progress.epoch, self.progress.position
            order = data.train_batches(
                encoded.lengths,
                train.batch_size,
                seed=self.config.seed,
                epoch=epoch,
                window=train.length_window,
            )
            for indices in order[position:]:
                if self.progress.step >= self.total_steps:
                    return
                size = train.batch_size
                yield data.collate(encoded, indices, size, dataset.edges, dataset.pad_id)

    def _compile(self, hyper: Hyper, batch: dict[str, np.ndarray]) -> bool:
        length = batch["input_ids"].shape[1]
        is_new = length not in self.meter.shapes
        args = (self.setup.program, self.state, self.setup.frozen, hyper, batch)
        self.meter.compile(length, train_step, *args)
        done = self.meter.steps_by_length
        done[length] = done.get(length, 0) + 1
        return is_new

    def _settle(self, step: int, lr: float, loss: jax.Array, bar: Any) -> bool:
        """Wait for a step's loss and record it; False when it is not finite."""
        value = float(loss)
        number = step + 1
        epoch = number / self.batches_per_epoch
        bar.update(1)
        if not math.isfinite(value):
            self.progress.reason = f"the loss is {value} at step {number}"
            self.tracker.log({"kind": "diverged", "step": number, "epoch": epoch, "loss": value})
            return False
        if number % self.config.train.log_every == 0 or number == 1:
            bar.set_postfix(loss=f"{value:.3f}", **self._best_so_far())
            self.tracker.log(
                {"kind": "train", "step": number, "epoch": epoch, "loss": value, "lr": lr}
            )
        return True

    def _best_so_far(self) -> dict[str, str]:
        best = self.progress.best
        name = self.dataset.task.metrics[0]
        return {f"best {name}": f"{best['metrics'][name]:.3f}"} if best else {}

    def _due(self) -> str | None:
        """What the step just done is followed by: an evaluation, a checkpoint, or nothing."""
        step, train = self.progress.step, self.config.train
        every = train.eval_every or self.batches_per_epoch
        if step % every == 0 or step == self.total_steps:
            return "evaluation"
        if train.checkpoint_every and step % train.checkpoint_every == 0:
            return "checkpoint"
        return None

    def _pause(self, due: str) -> None:
        if due == "evaluation":
            self._evaluate()
            if self.progress.reason:
                return  # weights that are not finite are not worth going on from
        spec = self.setup.spec
        record = {
            "progress": asdict(self.progress),
            "costs": self.meter.record(),
            "spec": asdict(spec) if spec else None,
        }
        self.checkpoints.save(self.progress.step, {"state": self.state, "best": self.best}, record)

    def _evaluate(self) -> None:
        progress = self.progress
        metrics = evaluate_splits(self.setup, self.dataset, self.state.trainable, self.config)
        point = {"step": progress.step, "epoch": progress.step / self.batches_per_epoch}
        name = self.dataset.task.metrics[0]
        is_finite = math.isfinite(metrics[name])
        self.tracker.log({"kind": "eval" if is_finite else "diverged", **point, **metrics})
        if not is_finite:
            progress.reason = f"the dev {name} is {metrics[name]} at step {progress.step}"
            return
        progress.last = {**point, "metrics": metrics}
        is_better = progress.best is None or metrics[name] > progress.best["metrics"][name]
        if is_better:
            progress.best, progress.evaluations_since_best = progress.last, 0
            self.best = jax.tree.map(np.asarray, self.state.trainable)
            return
        progress.evaluations_since_best += 1
        patience = self.config.train.early_stopping
        progress.stopped_early = bool(patience and progress.evaluations_since_best >= patience)


def evaluate_splits(
    setup: Setup, dataset: Dataset, trainable: Any, config: TrialConfig
) -> dict[str, float]:
    """Loss and metrics on every dev split.

    Names of further splits carry their suffix: MNLI has `accuracy` and `accuracy_mismatched`.
    """
    results: dict[str, float] = {}
    for n, (name, encoded) in enumerate(dataset.dev.items()):
        suffix = "" if n == 0 else "_" + name.removeprefix("dev_")
        outputs = predict_all(setup, dataset, encoded, trainable, config.train.eval_batch_size)
        task = dataset.task
        losses = example_losses(task.kind, outputs, encoded.labels)
        metrics = evaluate(task.metrics, task.kind, outputs, encoded.labels)
        metrics["loss"] = float(np.mean(losses))
        results |= {metric + suffix: value for metric, value in metrics.items()}
    return results


def predict_all(
    setup: Setup, dataset: Dataset, encoded: data.Encoded, trainable: Any, batch_size: int
) -> np.ndarray:
    """Model outputs for a whole split, (n, outputs), in the split's order."""
    batches = data.eval_batches(encoded.lengths, batch_size)
    outputs = []
    for indices in batches:
        batch = data.collate(encoded, indices, batch_size, dataset.edges, dataset.pad_id)
        outputs.append(predict(setup.program, trainable, setup.frozen, batch)[: len(indices)])
    order = np.argsort(np.concatenate(batches), kind="stable")
    return np.concatenate(outputs)[order]
