"""What stands behind our Hydra launchers: every trial is checked before the first one trains."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.sweep.cli import config_of
from lorax.sweep.jobs import Submit, run_jobs
from lorax.sweep.packed import run_packed
from lorax.sweep.plan_table import show_plan_if_asked
from lorax.sweep.serial import check_trials, objective, refuse_halving, summary_line, sweep_bar
from lorax.trial_id import trial_dir

log = logging.getLogger(__name__)
Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]
Compose = Callable[[Sequence[str]], Any]


def launch(
    compose: Compose,
    run: Launch,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> Sequence[JobReturn]:
    """Compose and check all of a sweep's trials, then run them one after another.

    Args:
      compose: from a job's overrides to its config.
      run: Hydra's basic launcher.
      job_overrides: what each job overrides.
      initial_job_idx: number of the first job.

    Raises:
      LoraxError: a trial that cannot run; nothing has been trained then.
    """
    trials = [config_of(compose(overrides)) for overrides in job_overrides]
    show_plan_if_asked(trials)
    refuse_halving(trials)
    check_trials(trials)
    returns: list[JobReturn] = []
    with sweep_bar(job_overrides) as bar:
        for n, overrides in enumerate(bar):
            returns += run([overrides], initial_job_idx + n)
    return returns


def launch_packed(
    compose: Compose, job_overrides: Sequence[Sequence[str]]
) -> Callable[[Any], float]:
    """Train all of a sweep's trials in packs.

    Args:
      compose: from a job's overrides to its config.
      job_overrides: what each job overrides.

    Returns:
      A task function for Hydra's own jobs, which leaves the training out: it gives each trial's
      result.

    Raises:
      LoraxError: see `run_packed`.
      SystemExit: after a plan has been printed.
    """
    trials = [config_of(compose(overrides)) for overrides in job_overrides]
    show_plan_if_asked(trials)
    return _recall_of(trials, run_packed(trials))


def launch_jobs(
    compose: Compose, submit: Submit, job_overrides: Sequence[Sequence[str]]
) -> Callable[[Any], float]:
    """As `launch_packed`, with the training in a cluster's jobs, which `submit` starts.

    The task function raises a LoraxError for a trial that a failed job has left open.
    """
    trials = [config_of(compose(overrides)) for overrides in job_overrides]
    if any(trial.sweep.plan for trial in trials):
        raise LoraxError(
            "sweep.plan=true plans for the devices of this machine: give it on one of the "
            "cluster's, with hydra/launcher=packed"
        )
    return _recall_of(trials, run_jobs(trials, submit))


def _recall_of(
    trials: Sequence[TrialConfig], ended: Sequence[dict[str, Any] | LoraxError]
) -> Callable[[Any], float]:
    results = dict(zip(map(trial_dir, trials), ended, strict=True))

    def recall(config: Any) -> float:
        result = results[trial_dir(config_of(config))]
        if isinstance(result, LoraxError):
            raise result
        log.info(summary_line(result))
        return objective(result)

    return recall


class FailedTrial(JobReturn):
    """A failed trial's return: raises its fault, without the line that Hydra prints before."""

    @property
    def return_value(self) -> Any:
        """Raises the fault."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def with_quiet_faults(returns: Sequence[JobReturn]) -> list[JobReturn]:
    """Hydra's returns, those that failed as `FailedTrial`."""
    return [FailedTrial(**vars(r)) if r.status is JobStatus.FAILED else r for r in returns]
