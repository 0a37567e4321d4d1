"""Trials as jobs of submitit: on Slurm or, to try things out, on this machine."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax.errors import LoraxError
from lorax.launch.jobs import Job, JobFailed, Outcome, log
from lorax.sweep.words import counted

# Options of all of submitit's executors; others belong to one executor and have its prefix.
COMMON = {
    *("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node"),
    *("tasks_per_node", "stderr_to_stdout"),
}
POLL_SECONDS = {"local": 0.5, "slurm": 5.0}


def submit(
    jobs: Sequence[Job], cluster: str, options: Mapping[str, Any]
) -> Iterator[tuple[int, Outcome]]:
    """Submit jobs together, on Slurm as one array, and wait for each.

    Args:
      jobs: the trials, by job.
      cluster: submitit's executor, `slurm` or `local`.
      options: those of hydra-submitit-launcher.

    Yields:
      A job's number and its outcome, when it ends.

    Raises:
      LoraxError: invalid options, or the cluster refuses the submission.
    """
    from submitit.helpers import as_completed

    submitted = _submit(jobs, cluster, options)
    numbers = {job.job_id: n for n, job in enumerate(submitted)}
    log.info("submitted: %s", _names(submitted))
    try:
        for job in as_completed(submitted, poll_frequency=POLL_SECONDS[cluster]):
            yield numbers[job.job_id], _outcome(job)
    finally:  # also when the consumer of the outcomes is interrupted
        _leave([job for job in submitted if not job.done()], cluster)


def _submit(jobs: Sequence[Job], cluster: str, options: Mapping[str, Any]) -> list[Any]:
    import submitit

    if (options.get("nodes") or 1) * (options.get("tasks_per_node") or 1) != 1:
        raise LoraxError("a job is one process: hydra.launcher.nodes=1, tasks_per_node=1")
    own = dict(options)
    start = {"folder": own.pop("submitit_folder")}
    start |= {f"{cluster}_{key}": own.pop(key) for key in ("max_num_timeout",) if key in own}
    named = {k if k in COMMON else f"{cluster}_{k}": v for k, v in own.items()}
    try:
        executor = submitit.AutoExecutor(cluster=cluster, **start)
        executor.update_parameters(**named)
        with contextlib.redirect_stderr(io.StringIO()):  # the fault has sbatch's message
            return executor.submit_array(jobs)
    except (RuntimeError, ValueError, NameError, AssertionError, OSError) as fault:
        lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
        raise LoraxError(f"cannot submit to {cluster}: {'; '.join(lines)}") from fault


def _outcome(job: Any) -> Outcome:
    from submitit.core.utils import FailedJobError, UncompletedJobError

    place = f"job {job.job_id}, log {job.paths.stderr}"
    try:
        return Outcome(place, job.result())
    except FailedJobError as fault:
        return Outcome(place, fault=_reason(str(fault)))
    except UncompletedJobError:
        return Outcome(place, fault=f"it ended without a result, state {job.state}")


def _reason(trace: str) -> str:
    """The line of JobFailed in a traceback's text, or else of the last exception."""
    marked = re.findall(rf"^\S*{JobFailed.__name__}: (.+)$", trace, re.MULTILINE)
    raised = re.findall(r"^[A-Za-z_][\w.]*: .+$", trace, re.MULTILINE)
    return (marked or raised or ["unknown"])[-1]


def _leave(running: Sequence[Any], cluster: str) -> None:
    """Cancel jobs on this machine; leave Slurm's jobs, which outlive this process, running."""
    if cluster == "local":
        for job in running:
            job.cancel()
    elif running:
        log.warning("still running: %s; to end them: scancel %s", _names(running), _ids(running))


def _names(submitted: Sequence[Any]) -> str:
    return f"{counted(len(submitted), 'job')} ({_ids(submitted)})"


def _ids(submitted: Sequence[Any]) -> str:
    return " ".join(dict.fromkeys(job.job_id.partition("_")[0] for job in submitted))
