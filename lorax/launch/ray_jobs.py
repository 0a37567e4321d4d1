"""Trials as tasks of Ray: on this machine's devices side by side, or on a cluster's."""

import logging
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorax.errors import LoraxError
from lorax.launch.jobs import Job, JobFailed, Outcome, Result, log
from lorax.sweep.words import counted

CONNECT_SECONDS = 10
REFUSALS = (ConnectionError, RuntimeError, TypeError, ValueError)


def connect(options: Mapping[str, Any]) -> None:
    """Start Ray or join a cluster, once per process, before JAX has threads; Ray ends at exit.

    Args:
      options: `address` of a cluster, None for this machine; `init`, more arguments of `ray.init`.

    Raises:
      LoraxError: no such cluster, or this machine lacks what a task requests.
    """
    import ray

    if ray.is_initialized():  # by an earlier batch of a sweeper
        return
    address = options["address"]
    _check_address(address)
    init = {"logging_level": logging.ERROR, "log_to_driver": False, **options["init"]}
    try:
        ray.init(address=address, **init)
    except (*REFUSALS, ray.exceptions.RayError) as fault:
        where = f"at {address}" if address else "here"
        raise LoraxError(f"cannot start Ray {where}: {_line(fault)}") from fault
    if address is None:  # a single machine gains no resources later
        _check_room(options, ray.cluster_resources())


def submit(jobs: Sequence[Job], options: Mapping[str, Any]) -> Iterator[tuple[int, Outcome]]:
    """Start jobs as tasks; Ray queues those without free resources and repeats crashed ones.

    Args:
      jobs: the trials, by job.
      options: what a task requests: `num_cpus`, `num_gpus` and other `resources`; and
        `max_retries` of a task whose process dies.

    Yields:
      A job's number and its outcome, when it ends.
    """
    import ray

    wants = {"num_cpus": options["num_cpus"], "num_gpus": options["num_gpus"]}
    wants |= {"resources": dict(options["resources"])} if options["resources"] else {}
    task = ray.remote(max_retries=options["max_retries"], **wants)(train_job)
    running = {task.remote(job): n for n, job in enumerate(jobs)}
    log.info("started: %s of Ray", counted(len(running), "task"))
    while running:
        (ended, *_), _ = ray.wait(list(running))
        yield running.pop(ended), _outcome(ended)


def train_job(job: Job) -> list[Result]:
    """Run a job as a task; print a fault's traceback to its log, as Ray only returns it."""
    try:
        return job()
    except JobFailed:
        traceback.print_exc()
        raise


def _check_address(address: str | None) -> None:
    """Check that the address accepts connections; `ray.init` would retry for 15 minutes."""
    host, _, port = (address or "").rpartition("/")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as fault:
        raise LoraxError(f"no Ray at {address}: {fault.strerror or fault}") from fault


def _check_room(options: Mapping[str, Any], there: Mapping[str, float]) -> None:
    wants = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
    for name, number in wants.items():
        if number > there.get(name, 0):
            raise LoraxError(
                f"a task asks for {number:g} {name}, but Ray finds {there.get(name, 0):g} here"
            )


def _outcome(ended: Any) -> Outcome:
    import ray

    place = f"task {ended.task_id().hex()[:12]}, logs in /tmp/ray/session_latest/logs"
    try:
        return Outcome(place, ray.get(ended))
    except JobFailed as fault:
        return Outcome(place, fault=_line(fault))
    except ray.exceptions.RayError as fault:
        return Outcome(place, fault=f"{type(fault).__name__}: {_line(fault)}")


def _line(fault: Exception) -> str:
    cause = getattr(fault, "cause", None) or fault
    return next(iter(str(cause).strip().splitlines()), "")
