"""The training loop: runs in lockstep, their evaluations and checkpoints."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lorax import data
from lorax.config import TrainConfig
from lorax.runtime import stop
from lorax.train.dataset import Dataset
from lorax.train.evaluation import predict_split, score
from lorax.train.metrics import is_constant
from lorax.train.run import Run
from lorax.train.single_engine import Engine, HostBatch

AT_THE_START = "before the first step of training: nothing is lost"


def _nothing(loop: "Loop") -> None:
    del loop


class Loop:
    """Trains runs that share task, steps and batch size, from where they stand to their ends.

    Args:
      dataset: the runs' own.
      runs: one, or several that an engine trains together.
      engine: computes the runs' steps.
      step: optimizer steps done.
      save: writes a checkpoint of everything.
      end: takes a run that is at its end, whichever that is.
      judge: called after each evaluation; may end runs, and replace `runs` and `engine`.
    """

    def __init__(
        self,
        dataset: Dataset,
        runs: Sequence[Run],
        engine: Engine,
        *,
        step: int,
        save: Callable[["Loop"], None],
        end: Callable[["Loop", Run], None],
        judge: Callable[["Loop"], None] = _nothing,
    ):
        self.dataset, self.runs, self.engine = dataset, list(runs), engine
        self.step, self._save, self._end, self._judge = step, save, end, judge
        self.full_steps: list[float] = []  # seconds of the steps of all runs together
        self._width = len(runs)
        self._losses = np.full(len(runs), np.nan, np.float32)  # of the step that was read last
        self._saved_step, self._saved_at = step, time.monotonic()
        self.train = runs[0].config.train
        self.batches_per_epoch = runs[0].batches_per_epoch
        self.total_steps = runs[0].total_steps

    def alive(self) -> list[Run]:
        """The runs that go on."""
        return [run for run in self.runs if run.is_alive]

    def run(self, bar: Any) -> None:
        """Train to the end; a signal that stops the process acts when the step is saved.

        Args:
          bar: a progress bar with `update`, `set_postfix` and `set_postfix_str`.
        """
        with stop.training():
            self._run(bar)

    def _run(self, bar: Any) -> None:
        self.end_runs()  # killed after their last checkpoint, before their results
        pending: tuple[int, list[float], jax.Array] | None = None
        clock = time.perf_counter()
        for batches in self._batches():
            hypers = [run.hyper(self.step) for run in self.runs]
            cost, is_new = self.engine.compile(hypers, batches)
            if self.step == self._saved_step:
                self._stop_if_asked()
            start, seconds = time.perf_counter(), None
            losses = self.engine.step(hypers, batches)
            rates = [float(hyper.lr) for hyper in hypers]
            previous, pending = pending, (self.step + 1, rates, losses)
            if previous:
                self._settle(*previous, bar)
                seconds = time.perf_counter() - clock
            if not self.alive():
                break
            self._advance(batches[0]["input_ids"].size, cost, is_new)
            due = self._due()
            if due:
                self._settle(*pending, bar)
                seconds = seconds or time.perf_counter() - start
                pending = None
            if seconds and not is_new:
                self._add_step(seconds)
            if due:
                self._pause(due, bar)
            if not self.alive():
                break
            if self.step == self._saved_step:
                self._stop_if_asked()
            clock = time.perf_counter()
        self.end_runs(all_of_them=True)

    def _batches(self) -> Iterator[list[HostBatch]]:
        """Each run's next batch, all packed alike; a pure function of seeds and step."""
        encoded, train = self.dataset.train, self.train
        while self.alive() and self.step < self.total_steps:
            epoch, position = divmod(self.step, self.batches_per_epoch)
            orders = {
                seed: data.train_batches(len(encoded), train.batch_size, seed=seed, epoch=epoch)
                for seed in {run.config.seed for run in self.runs}
            }
            for n in range(position, self.batches_per_epoch):
                if self.step >= self.total_steps:
                    return
                seeds = {run.config.seed for run in self.runs}  # runs may have been left out
                batches = collate_alike(self.dataset, {s: orders[s][n] for s in seeds}, train)
                yield [batches[run.config.seed] for run in self.runs]

    def _advance(self, tokens: int, cost: Any, is_new: bool) -> None:
        self.step += 1
        for run in self.alive():
            run.progress.step += 1
            run.meter.count(tokens, cost, is_new)

    def _add_step(self, seconds: float) -> None:
        if len(self.runs) == self._width:
            self.full_steps.append(seconds)
        for run in self.alive():
            run.meter.add_step(seconds)

    def _settle(self, number: int, rates: list[float], losses: jax.Array, bar: Any) -> None:
        """Wait for a step's losses and record them."""
        self._losses = self.engine.read(losses)
        for run, lr, loss in zip(self.runs, rates, self._losses, strict=True):
            if run.is_alive:
                run.settle(number, lr, float(loss))
        bar.update(1)
        if number % self.train.log_every == 0 or number == 1:
            bar.set_postfix(self._postfix())
        self.end_runs()

    def _postfix(self) -> dict[str, str]:
        shown = {"loss": f"{np.median(self._losses):.3f}"}
        if len(self.runs) > 1:
            shown["trials"] = str(len(self.alive()))
        best = max(self.runs, key=lambda run: run.signed_best)
        if best.best_value is None:
            return shown
        return {**shown, f"best {best.metric}": f"{best.best_value:.3f}"}

    def _due(self) -> str | None:
        """What the step just done is followed by: an evaluation, a checkpoint, or nothing."""
        every, minutes = (
            self.train.eval_every or self.batches_per_epoch,
            self.train.checkpoint_minutes,
        )
        if self.step % every == 0 or self.step == self.total_steps:
            return "evaluation"
        is_counted = self.train.checkpoint_every and self.step % self.train.checkpoint_every == 0
        is_late = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        return "checkpoint" if is_counted or is_late or stop.is_asked() else None

    def _stop_if_asked(self) -> None:
        """Let a signal act; all that was trained is saved."""
        at = f"at step {self.step} of {self.total_steps}, which is saved"
        standing = f"{at}; the same command goes on from there" if self.step else AT_THE_START
        stop.act(standing)

    def _pause(self, due: str, bar: Any) -> None:
        if due == "evaluation" and self.alive():
            bar.set_postfix_str("evaluating")
            self._evaluate()
            bar.set_postfix(self._postfix())
            self._judge(self)
        if any(not run.progress.reason for run in self.runs):
            self._save(self)  # weights that are not finite are not worth going on from
            self._saved_step, self._saved_at = self.step, time.monotonic()
        self.end_runs()

    def _evaluate(self) -> None:
        size = self.train.eval_batch_size
        outputs = {
            name: predict_split(self.engine.predict, self.dataset, encoded, size)
            for name, encoded in self.dataset.dev.items()
        }
        for n, run in enumerate(self.runs):
            if run.is_alive:
                own = {name: x[n] for name, x in outputs.items()}
                run.evaluated(
                    score(self.dataset, own),
                    lambda n=n: self.engine.trainable(n),  # type: ignore[misc]
                    is_constant=is_constant(self.dataset.task.kind, next(iter(own.values()))),
                )

    def end_runs(self, *, all_of_them: bool = False) -> None:
        """Hand over every run that is at its end and has not been handed over."""
        for run in self.runs:
            if not run.has_ended and (all_of_them or not run.is_alive):
                self._end(self, run)
                run.has_ended = True


def collate_alike(
    dataset: Dataset, chosen: dict[int, np.ndarray], train: TrainConfig
) -> dict[int, HostBatch]:
    """Batches of one shape, the smallest that holds each of the chosen ones."""
    batches = data.collate_alike(
        dataset.train,
        list(chosen.values()),
        dataset.layout,
        parts=train.grad_accum,
        pad_id=dataset.pad_id,
    )
    return dict(zip(chosen, batches, strict=True))
