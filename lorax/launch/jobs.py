"""Trials as jobs of a cluster: the part that the Slurm and Ray launchers share.

The submitting process composes, checks and groups trials; it trains nothing and holds no
accelerator. Each job plans packs of its trials on its own device and returns their results.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.launch.application import quiet_libraries
from lorax.runs.results import Result
from lorax.runs.trial import Trial
from lorax.runtime import stop
from lorax.runtime.process import prepare_process
from lorax.runtime.provenance import command_line, set_command_line
from lorax.sweep.compatibility import group_for_jobs
from lorax.sweep.damaged import left_out, without_damaged
from lorax.sweep.run_sweep import catch_up_all, checked, run_packed
from lorax.sweep.words import counted

log = logging.getLogger(__name__)


class JobFailed(RuntimeError):  # noqa: N818
    """A job's fault, in one line, as the job raises it."""


@dataclass(frozen=True)
class Job:
    """Trials to train in another process; submitit and Ray pickle and call it.

    Attributes:
      trials: trials that can share a program; see `group_for_jobs`.
      directory: the directory of submission; a trial's relative paths refer to it.
      command: the command that submitted it, for the results.
    """

    trials: list[TrialConfig]
    directory: str = field(default_factory=lambda: str(Path.cwd()))
    command: str = field(default_factory=command_line)

    def __call__(self) -> list[Result]:
        """Train the trials.

        Raises:
          JobFailed: any fault, in one line; the job's log has its cause.
        """
        _open_log()
        prepare_process()
        try:
            os.chdir(self.directory)
            set_command_line(self.command)
            with stop.in_a_job():
                return run_packed(self.trials)
        except Exception as fault:
            raise JobFailed(_reason(fault)) from fault

    def checkpoint(self) -> Any:
        """What submitit submits again after preemption or a timeout: the same job.

        Its packs resume from their own checkpoints; the last trained step is saved.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
      place: the job's name on its cluster, and its log.
      results: of its trials, in order; None if it failed.
      fault: why it failed, in one line.
    """

    place: str
    results: list[Result] | None = None
    fault: str = ""


Submit = Callable[[Sequence[Job]], Iterator[tuple[int, Outcome]]]


def run_jobs(trials: Sequence[TrialConfig], submit: Submit) -> list[Result | LoraxError]:
    """Check all trials, train them as jobs and wait for all jobs; ended trials are skipped.

    Args:
      trials: a sweep.
      submit: starts jobs, and yields each job's number and outcome as it ends.

    Returns:
      A result for each trial, in order. Trials that a failed job left open have a fault that
      counts them; trials whose results are damaged have a fault that names the first.

    Raises:
      LoraxError: a trial cannot run (before anything is submitted), or the submission failed.
    """
    _leave_accelerators_alone()
    asked = checked(trials, devices_are_here=False)
    unique, damaged = without_damaged(list(dict.fromkeys(asked)))
    catch_up_all(unique)
    groups = group_for_jobs([trial.config for trial in unique])
    # Submit whole groups: a killed pack resumes with its ended trials in their lanes.
    jobs = [[unique[n] for n in group] for group in groups]
    jobs = [job for job in jobs if any(trial.is_open for trial in job)]
    results, failed = _wait(jobs, submit)
    ended = {trial: results.get(trial) or trial.result() for trial in unique}
    left = sum(result is None for result in ended.values())
    fault = LoraxError(
        f"{len(failed)} of {counted(len(jobs), 'job')} failed and left {counted(left, 'trial')}; "
        "the same command resumes them"
    )
    faults = dict.fromkeys(damaged, left_out(damaged)) if damaged else {}
    return [faults.get(trial) or ended.get(trial) or fault for trial in asked]


def _leave_accelerators_alone() -> None:
    """Run the checks on the CPU: their weights must not take memory of the jobs' devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # not by the variable, which jobs would inherit


def _wait(
    groups: Sequence[Sequence[Trial]], submit: Submit
) -> tuple[dict[Trial, Result], list[int]]:
    """(results of the jobs, one job for each group of trials; numbers of the failed jobs)."""
    results: dict[Trial, Result] = {}
    failed: list[int] = []
    if not groups:
        return results, failed
    total = sum(map(len, groups))
    log.info("%s to train as %s", counted(total, "trial"), counted(len(groups), "job"))
    silent = not sys.stderr.isatty()
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, desc="sweep", unit="trial", disable=silent) as bar,
    ):
        for n, outcome in submit([Job([trial.config for trial in group]) for group in groups]):
            name = f"job {n + 1} of {len(groups)}, {counted(len(groups[n]), 'trial')}"
            if outcome.results is None:
                failed.append(n)
                log.error("%s: failed, %s (%s)", name, outcome.fault, outcome.place)
            else:
                results |= zip(groups[n], outcome.results, strict=True)
                log.info("%s: ended (%s)", name, outcome.place)
            bar.update(len(groups[n]))
    return results, failed


def _open_log() -> None:
    """Log lorax's records to the job's stdout, which submitit and Ray keep."""
    quiet_libraries()
    logger = logging.getLogger("lorax")
    if not logger.handlers:  # a process of Ray runs several jobs
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _reason(fault: Exception) -> str:
    """The fault in one line; a fault other than LoraxError with its class name."""
    text = next((line.strip() for line in str(fault).splitlines() if line.strip()), "")
    return text if isinstance(fault, LoraxError) else f"{type(fault).__name__}: {text}"
