"""`result.json`: the result of a trial that has ended."""

import json
import logging
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from lorax.errors import LoraxError

log = logging.getLogger(__name__)
RESULT = "result.json"
Status = Literal["finished", "diverged", "cut"]
PRUNED: Literal["cut"] = "cut"  # the word on disk for a trial that successive halving ended
STATUSES = ("finished", "diverged", PRUNED)


class Evaluation(TypedDict):
    """The dev metrics at a step.

    `constant` is present, and true, if all examples of the first dev split got the same prediction.
    """

    step: int
    epoch: float
    metrics: dict[str, float]
    constant: NotRequired[bool]


class Pruned(TypedDict):
    """The step at which halving ended a trial, and the comparison that decided it."""

    step: int
    rung: int
    place: int
    of: int
    goes_on: int


class Costs(TypedDict):
    """The costs of a trial; times are its share of the process's time. None if not measured."""

    seconds_per_step: float | None
    seconds_total: float
    compile_seconds: float
    step_memory_bytes: int
    flops_per_step: float | None
    steps_by_tokens: dict[str, int]
    lanes: int
    peak_rss_bytes: int
    peak_device_bytes: int | None


class Counts(TypedDict):
    """Numbers of parameters."""

    adapter_params: int
    head_params: int
    base_params: int
    trainable_params: int
    total_params: int


class Result(Costs, Counts):
    """The content of `result.json`.

    Attributes:
      status: `finished`, `diverged`, or `cut` by successive halving.
      reason: why it diverged.
      cut: how halving ended it.
      metric: the task's main metric.
      best: the best evaluation, whose adapter is kept.
      last: the last evaluation.
      steps: optimizer steps done.
    """

    trial_id: str
    status: Status
    reason: str | None
    cut: Pruned | None
    metric: str
    best: Evaluation | None
    last: Evaluation | None
    steps: int
    stopped_early: bool
    adapter_bytes: int
    base_bytes: int
    seed: int
    content: dict[str, str | None]
    command: str
    began: str | None
    ended: str
    environment: dict[str, Any]


def read_result(directory: Path) -> Result | None:
    """The result of a trial that has ended; None if it has not, or if a part of it is missing.

    Raises:
      LoraxError: an existing file cannot be read, or is not the JSON of a result.
    """
    result = _stored_result(directory)
    return None if result is None or missing_parts(directory, result) else result


def _stored_result(directory: Path) -> Result | None:
    path = directory / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        fault = _fault_of(result)
    except OSError as failed:
        raise LoraxError(f"cannot read {path}: {failed.strerror or failed}") from failed
    except (ValueError, RecursionError) as failed:
        fault = str(failed)
    if fault:
        raise LoraxError(f"{path} is damaged ({fault}); delete it to run the trial again")
    return result


def _fault_of(result: Any) -> str | None:
    """The fault of a result's JSON, in a few words; None if it is sound."""
    status = _entry(result, ["status"])
    if status not in STATUSES:
        return f"its status is none of {', '.join(STATUSES)}"
    wanted: list[tuple[list[Any], Any]] = [(["trial_id"], str)]
    if status != "diverged":
        wanted += [(["metric"], str), (["best", "step"], int), (["steps"], int)]
        wanted += [(["trainable_params"], int), (["seconds_total"], int | float)]
        wanted += [(["best", "metrics", _entry(result, ["metric"])], int | float | None)]
    if status == PRUNED:
        wanted += [(["cut", name], int) for name in ("step", "place", "of")]
    wrong = (path for path, kind in wanted if not isinstance(_entry(result, path), kind))
    path = next(wrong, None)
    return f"{'.'.join(map(str, path))} is missing or of another type" if path else None


def _entry(value: Any, path: list[Any]) -> Any:
    """The entry at a path of nested objects; Ellipsis, which JSON lacks, if there is none."""
    for name in path:
        is_there = isinstance(value, dict) and isinstance(name, str) and name in value
        value = value[name] if is_there else ...
    return value


def sound_result(directory: Path) -> Result | None:
    """The result of `read_result`; None also for a damaged one."""
    try:
        return read_result(directory)
    except LoraxError:
        return None


def missing_parts(directory: Path, result: Result) -> list[str]:
    """The missing ones of an ended trial's files; a diverged trial may lack its adapter."""
    parts = ["config.json"] if result["status"] == "diverged" else ["config.json", "adapter"]
    return [name for name in parts if not (directory / name).exists()]


def drop_incomplete(directory: Path) -> None:
    """Delete, with a warning, the result of a trial that misses a part: the trial runs again."""
    result = _stored_result(directory)
    if result and (missing := missing_parts(directory, result)):
        words = "%s has a result, but no %s: the trial is run again"
        log.warning(words, directory, " and no ".join(missing))
        (directory / RESULT).unlink()
