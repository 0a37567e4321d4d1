"""Trains trials one after another in one process, which share data and compiled programs."""

import contextlib
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.metric_direction import signed
from lorax.runs.content import refuse_other_content
from lorax.runs.results import Result
from lorax.runs.trial import Trial
from lorax.runs.trial_id import trial_id
from lorax.sweep.damaged import left_out, without_damaged
from lorax.train import check_trial, run_trial

log = logging.getLogger(__name__)


def check_trials(trials: Sequence[TrialConfig], *, devices_are_here: bool = True) -> list[Trial]:
    """Check a sweep before any trial trains; see `check_trial` and `refuse_other_content`.

    Returns:
      The trials, in order.

    Raises:
      LoraxError: names the first trial that cannot run, and the reason.
    """
    checked = []
    for config in trials:
        try:
            check_trial(config, devices_are_here=devices_are_here)
            checked.append(Trial.of(config))
            refuse_other_content(checked[-1])
        except LoraxError as fault:
            where = f" (trial {trial_id(config)})" if len(trials) > 1 else ""
            raise LoraxError(f"{fault}{where}") from fault
    return checked


def run_trials(trials: Sequence[TrialConfig]) -> list[Result]:
    """Check every trial, then run each; finished ones are skipped.

    A trial whose result on disk is damaged is left out; the others are run.

    Returns:
      Their results, in order; see `lorax.train.run_trial`.

    Raises:
      LoraxError: see `check_trials`; a directory that cannot be written; in the end, a damaged
        result.
    """
    sound, damaged = without_damaged(check_trials(trials))
    with sweep_bar(sound) as bar:
        results = [run_and_log(trial.config) for trial in bar]
    if damaged:
        raise left_out(damaged)
    return results


def run_and_log(trial: TrialConfig) -> Result:
    """Run a trial and log one line on how it ended."""
    refuse_halving([trial])
    result = run_trial(trial)
    log.info(summary_line(result))
    return result


def refuse_halving(trials: Sequence[TrialConfig]) -> None:
    """Refuse halving: trials that train one after another cannot be compared in training.

    Raises:
      LoraxError: `sweep.halving` is on.
    """
    if any(trial.sweep.halving.after is not None for trial in trials):
        raise LoraxError("sweep.halving compares trials in lockstep: add -m hydra/launcher=packed")


@contextlib.contextmanager
def sweep_bar(trials: Sequence[Any]) -> Iterator[Iterable[Any]]:
    """A progress bar over trials, above the trial's own; log lines appear above both."""
    bar = tqdm(trials, desc="sweep", unit="trial", disable=not sys.stderr.isatty())
    with logging_redirect_tqdm():
        yield bar


def objective(result: Result) -> float:
    """The value that a sweeper maximises: the best main metric, negated if lower is better.

    A diverged trial gives -inf: a sweeper would treat None as a failure and learn nothing.
    """
    if result["status"] == "diverged":
        return -math.inf
    score = score_of(result)
    return -math.inf if math.isnan(score) else signed(result["metric"], score)


def score_of(result: Result) -> float:
    """The best value of the task's main metric; NaN without one, as for a diverged trial."""
    best = result["best"] if result["status"] != "diverged" else None
    score = best and best["metrics"][result["metric"]]
    return math.nan if score is None else score


def summary_line(result: Result) -> str:
    """One line on a trial that has ended."""
    if result["status"] == "diverged":
        return f"{result['trial_id']}: diverged, {result['reason']}"
    name, best = result["metric"], result["best"]
    score = score_of(result)
    if cut := result.get("cut"):
        return (
            f"{result['trial_id']}: pruned at step {cut['step']}, {cut['place']} of {cut['of']} "
            f"by {name}, {score:.4f}"
        )
    assert best is not None  # every trial is evaluated at its end
    return (
        f"{result['trial_id']}: {name} {score:.4f} at step {best['step']} of {result['steps']}, "
        f"{result['trainable_params']:,} trained parameters, {result['seconds_total']:.0f} s"
    )
