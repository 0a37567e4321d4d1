"""The training loop: runs in lockstep, their evaluations and checkpoints."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.runtime import stop
from lorax.runtime.compiler import StepCost
from lorax.train.batch_stream import BatchStream
from lorax.train.compile_ahead import CompileAhead
from lorax.train.dataset import Dataset
from lorax.train.engine import Engine
from lorax.train.evaluation import predict_split, score
from lorax.train.hyper_stream import HyperStream
from lorax.train.metrics import is_constant
from lorax.train.prefix import FrozenPrefix
from lorax.train.run import Run

AT_THE_START = "before the first step of training: nothing is lost"


class _Pending(NamedTuple):
    """A started step: its number from 1, the learning rates (K,), the losses (K,)."""

    number: int
    rates: np.ndarray
    losses: jax.Array


def _nothing(loop: "Loop") -> None:
    del loop


class Loop:
    """Trains runs that share task, steps and batch size, from their current step to their ends.

    Args:
      dataset: of the runs.
      runs: one, or several that an engine trains together.
      engine: computes the runs' steps.
      step: optimizer steps done.
      save: writes a checkpoint of all runs.
      end: called with each run that has ended, for whatever reason.
      judge: called after each evaluation; may end runs and call `keep`.
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
        self.dataset, self.engine, self.step = dataset, engine, step
        self._save, self._end, self._judge = save, end, judge
        self.train = runs[0].config.train
        self.batches_per_epoch = runs[0].batches_per_epoch
        self.total_steps = runs[0].total_steps
        self.full_steps: list[float] = []  # seconds per step of all runs together
        self._width = len(runs)
        self._saved_step, self._saved_at = step, time.monotonic()
        self._take(runs)

    def _take(self, runs: Sequence[Run]) -> None:
        configs = [run.config for run in runs]
        seeds = [config.seed for config in configs]
        self.runs = list(runs)
        engine, setup = self.engine, runs[0].setup
        self._prefix = FrozenPrefix(engine.program, setup, configs[0], self.dataset, engine.mesh)
        split = self._prefix.split(self.dataset.train)
        self._batches = BatchStream(self.dataset, self.train, seeds, split)
        self._hypers = HyperStream(configs, self.total_steps)
        self._log_every = np.asarray([config.train.log_every for config in configs])
        self._losses = np.full(len(runs), np.nan, np.float32)  # of the latest step that was read

    def keep(self, places: Sequence[int]) -> None:
        """Keep the runs at these places, in this order; the engine has dropped the others."""
        self._take([self.runs[n] for n in places])

    def alive(self) -> list[Run]:
        """The runs that continue."""
        return [run for run in self.runs if run.is_alive]

    def run(self, bar: Any) -> None:
        """Train to the end; a signal that stops the process acts after the step is saved.

        Args:
          bar: a progress bar with `update`, `set_postfix` and `set_postfix_str`.
        """
        with stop.training():
            self.end_runs()  # runs that were killed between last checkpoint and result
            with self._compile_ahead():
                self._run(bar)
            self.end_runs(all_of_them=True)

    def _compile_ahead(self) -> CompileAhead:
        is_over = self.step >= self.total_steps or not self.alive()
        # On a mesh a program is compiled from arrays, which a step may donate meanwhile.
        is_needed = not is_over and self.engine.mesh is None
        batches = self._batches.unlike(self.step, self.total_steps) if is_needed else []
        return CompileAhead(self.engine, self._hypers.at(0), batches)

    def _run(self, bar: Any) -> None:
        pending: _Pending | None = None
        clock = time.perf_counter()
        while self.step < self.total_steps and self.alive():
            batch, hyper = self._batches.at(self.step), self._hypers.at(self.step)
            cost, is_new = self.engine.compile(hyper, batch)
            if self.step == self._saved_step:
                self._stop_if_asked()
            start, seconds = time.perf_counter(), None
            losses = self.engine.step(hyper, batch)
            previous, pending = pending, _Pending(self.step + 1, hyper.lr, losses)
            if previous:
                self._settle(previous, bar)
                seconds = time.perf_counter() - clock
            if not (alive := self.alive()):
                break
            self._advance(alive, batch.shape.tokens, cost, is_new)
            due = self._due()
            if due:
                self._settle(pending, bar)
                seconds = seconds or time.perf_counter() - start
                pending = None
            if seconds and not is_new:
                self._add_step(alive, seconds)
            if due:
                self._pause(due, bar)
            if self.step == self._saved_step and self.alive():
                self._stop_if_asked()
            clock = time.perf_counter()

    def _advance(self, alive: Sequence[Run], tokens: int, cost: StepCost, is_new: bool) -> None:
        self.step += 1
        for run in alive:
            run.progress.step += 1
            run.meter.count(tokens, cost, is_new)

    def _add_step(self, alive: Sequence[Run], seconds: float) -> None:
        if len(self.runs) == self._width:
            self.full_steps.append(seconds)
        for run in alive:
            run.meter.add_step(seconds)

    def _settle(self, step: _Pending, bar: Any) -> None:
        """Wait for a step's losses and record them."""
        self._losses = self.engine.read(step.losses)
        is_finite = np.isfinite(self._losses)
        is_logged = (step.number % self._log_every == 0) | (step.number == 1)
        for n in np.flatnonzero(is_logged | ~is_finite).tolist():
            if self.runs[n].is_alive:
                self.runs[n].settle(step.number, float(step.rates[n]), float(self._losses[n]))
        bar.update(1)
        if step.number % self.train.log_every == 0 or step.number == 1:
            bar.set_postfix(self._postfix())
        if not is_finite.all():
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
        """What follows the current step: an evaluation, a checkpoint, or nothing."""
        every = self.train.eval_every or self.batches_per_epoch
        if self.step % every == 0 or self.step == self.total_steps:
            return "evaluation"
        minutes = self.train.checkpoint_minutes
        is_counted = self.train.checkpoint_every and self.step % self.train.checkpoint_every == 0
        is_late = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        return "checkpoint" if is_counted or is_late or stop.is_asked() else None

    def _stop_if_asked(self) -> None:
        """Let a waiting signal act; the step must be saved already."""
        at = f"at step {self.step} of {self.total_steps}, which is saved"
        saved = f"{at}; the same command resumes from there" if self.step else AT_THE_START
        stop.act(saved)

    def _pause(self, due: str, bar: Any) -> None:
        if due == "evaluation" and self.alive():
            bar.set_postfix_str("evaluating")
            self._evaluate()
            bar.set_postfix(self._postfix())
            self._judge(self)
        if any(not run.progress.reason for run in self.runs):
            self._save(self)  # not weights that are not finite: resuming from them is useless
            self._saved_step, self._saved_at = self.step, time.monotonic()
        self.end_runs()

    def _evaluate(self) -> None:
        predict, size = self.engine.predict, self.train.eval_batch_size
        outputs = {
            name: predict_split(predict, self.dataset, encoded, size, self._prefix.split(encoded))
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
        """Pass each run that has ended to `end`, once."""
        for run in self.runs:
            if not run.has_ended and (all_of_them or not run.is_alive):
                self._end(self, run)
                run.has_ended = True
