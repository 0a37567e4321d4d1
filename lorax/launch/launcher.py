"""The code behind lorax's Hydra launchers: every trial is checked before the first one trains."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.launch.application import config_of, submission_directory
from lorax.launch.jobs import Submit, run_jobs
from lorax.runs.results import Result
from lorax.runs.trial_id import trial_dir
from lorax.sweep.damaged import left_out, without_damaged
from lorax.sweep.plan_table import show_plan_if_asked
from lorax.sweep.run_serial import check_trials, objective, refuse_halving, summary_line, sweep_bar
from lorax.sweep.run_sweep import run_sound
from lorax.sweep.summary import log_closing

log = logging.getLogger(__name__)
Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]


def launch(
    trials: Sequence[TrialConfig],
    run: Launch,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> Sequence[JobReturn]:
    """Check all of a sweep's trials, then run them one after another.

    Args:
      trials: a trial for each job.
      run: Hydra's basic launcher.
      job_overrides: the overrides of each job.
      initial_job_idx: number of the first job.

    Returns:
      Hydra's JobReturns; that of a trial whose result on disk is damaged raises its fault.

    Raises:
      LoraxError: a trial cannot run; nothing has been trained.
    """
    show_plan_if_asked(trials)
    refuse_halving(trials)
    checked = check_trials(trials)
    _, damaged = without_damaged(checked)
    returns: list[JobReturn] = []
    with sweep_bar(job_overrides) as bar:
        for n, overrides in enumerate(bar):
            if checked[n] in damaged:
                returns.append(_failed(left_out(damaged)))
            else:
                returns += run([overrides], initial_job_idx + n)
    log_closing(trials)
    return returns


class Ended:
    """A task function for Hydra's jobs after training: it returns each trial's objective.

    It raises the fault of a trial that has no result.
    """

    def __init__(self, trials: Sequence[TrialConfig], ended: Sequence[Result | LoraxError]) -> None:
        self.trials = trials
        self.results = dict(zip(map(trial_dir, trials), ended, strict=True))

    def __call__(self, config: Any) -> float:
        """The objective of the trial that a config describes."""
        with submission_directory():
            result = self.results[trial_dir(config_of(config))]
        if isinstance(result, LoraxError):
            raise result
        log.info(summary_line(result))
        return objective(result)

    def close(self, returns: Sequence[JobReturn]) -> list[JobReturn]:
        """Log the closing lines; return Hydra's JobReturns, failed ones as `FailedTrial`."""
        log_closing(self.trials)
        return with_quiet_faults(returns)


def launch_packed(trials: Sequence[TrialConfig]) -> Ended:
    """Train all of a sweep's trials in packs.

    Raises:
      LoraxError: see `run_packed`; a damaged result is raised by the task function.
      SystemExit: after a plan has been printed.
    """
    show_plan_if_asked(trials)
    return Ended(trials, run_sound(trials))


def launch_jobs(trials: Sequence[TrialConfig], submit: Submit) -> Ended:
    """As `launch_packed`, but train in jobs of a cluster, which `submit` starts.

    The task function raises a LoraxError for a trial that a failed job left open.
    """
    if any(trial.sweep.plan for trial in trials):
        raise LoraxError(
            "sweep.plan=true plans for the devices of this machine: give it on one of the "
            "cluster's, with hydra/launcher=packed"
        )
    return Ended(trials, run_jobs(trials, submit))


class FailedTrial(JobReturn):
    """A failed trial's JobReturn: raises its fault without the line that Hydra prints first."""

    @property
    def return_value(self) -> Any:
        """Raise the fault."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def with_quiet_faults(returns: Sequence[JobReturn]) -> list[JobReturn]:
    """Hydra's JobReturns, failed ones as `FailedTrial`."""
    return [FailedTrial(**vars(r)) if r.status is JobStatus.FAILED else r for r in returns]


def _failed(fault: LoraxError) -> JobReturn:
    return FailedTrial(status=JobStatus.FAILED, _return_value=fault)
