"""Hydra's basic launcher, with every trial checked before the first one trains."""

from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.utils import JobReturn

from lorax.sweep.cli import config_of
from lorax.sweep.serial import check_trials, sweep_bar

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]


def launch(
    compose: Callable[[Sequence[str]], Any],
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
    check_trials([config_of(compose(overrides)) for overrides in job_overrides])
    returns: list[JobReturn] = []
    with sweep_bar(job_overrides) as bar:
        for n, overrides in enumerate(bar):
            returns += run([overrides], initial_job_idx + n)
    return returns
