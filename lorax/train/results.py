"""`result.json` and `adapter/`: what a trial leaves when it has ended."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from lorax.checkpoint import save_adapter, sync_all, write_json
from lorax.errors import LoraxError
from lorax.lora import count_bytes, unpad
from lorax.tracking import METRICS, finite
from lorax.train.content import with_content
from lorax.train.lane import Lane
from lorax.train.measure import environment
from lorax.train.provenance import command_line, now
from lorax.train.restore import RESULT
from lorax.train.setup import HEAD, Setup

log = logging.getLogger(__name__)
Result = dict[str, Any]
CUT = "cut"
STATUSES = ("finished", "diverged", CUT)


def read_result(directory: Path) -> Result | None:
    """The result of a trial that has ended; None while it has not, or if a part of it is missing.

    Raises:
      LoraxError: a file that is there and cannot be read, or is not the JSON of a result.
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
    """What is wrong with a result's JSON, in a few words; None for nothing."""
    status = _entry(result, ["status"])
    if status not in STATUSES:
        return f"its status is none of {', '.join(STATUSES)}"
    wanted: list[tuple[list[Any], Any]] = [(["trial_id"], str)]
    if status != "diverged":
        wanted += [(["metric"], str), (["best", "step"], int), (["steps"], int)]
        wanted += [(["trainable_params"], int), (["seconds_total"], int | float)]
        wanted += [(["best", "metrics", _entry(result, ["metric"])], int | float | None)]
    if status == CUT:
        wanted += [(["cut", name], int) for name in ("step", "place", "of")]
    wrong = (path for path, kind in wanted if not isinstance(_entry(result, path), kind))
    path = next(wrong, None)
    return f"{'.'.join(map(str, path))} is missing or of another type" if path else None


def _entry(value: Any, path: list[Any]) -> Any:
    """The entry of nested objects; an Ellipsis, which JSON does not have, where there is none."""
    for name in path:
        is_there = isinstance(value, dict) and isinstance(name, str) and name in value
        value = value[name] if is_there else ...
    return value


def sound_result(directory: Path) -> Result | None:
    """The result as `read_result` gives it; None for a damaged one, too."""
    try:
        return read_result(directory)
    except LoraxError:
        return None


def missing_parts(directory: Path, result: Result) -> list[str]:
    """The files that an ended trial leaves and that are not there; a diverged one's adapter may."""
    parts = ["config.json"] if result["status"] == "diverged" else ["config.json", "adapter"]
    return [name for name in parts if not (directory / name).exists()]


def drop_incomplete(directory: Path) -> None:
    """Forget the result of a trial of which a part is missing, and say so: it is run again."""
    result = _stored_result(directory)
    if result and (missing := missing_parts(directory, result)):
        words = "%s has a result, but no %s: the trial is run again"
        log.warning(words, directory, " and no ".join(missing))
        (directory / RESULT).unlink()


def finished_result(directory: Path) -> Result | None:
    """As `read_result`, but None for a trial that halving cut: it can go on."""
    result = read_result(directory)
    return None if result and result["status"] == CUT else result


def write_result(lane: Lane) -> Result:
    """Write a lane's adapter, as its best evaluation saw it, and its result; end its tracker."""
    adapter = lane.directory / "adapter"
    adapter_bytes = _save_adapter(adapter, lane)
    result = _result(lane, adapter_bytes)
    for path in filter(Path.exists, (adapter, lane.directory / METRICS)):
        sync_all(path)  # a result that outlives a loss of power says that these are whole
    write_json(lane.directory / RESULT, result)
    lane.tracker.finish(result, adapter)
    return result


def _save_adapter(path: Path, lane: Lane) -> int:
    """Keep the best evaluation's trained part, at its true rank."""
    trained, spec = lane.best, lane.setup.spec
    if spec:
        ranks = {target: spec.rank_of(target) for target in trained["lora"]}
        trained = {**trained, "lora": unpad(trained["lora"], ranks)}
    stored = {name: getattr(lane.config.train, name) for name in ("precision", "base_dtype")}
    content = lane.setup.content
    base = dataclasses.asdict(with_content(lane.config, content).model)
    about = {
        "base": base,
        **stored,
        "content": dataclasses.asdict(content),
        "best": lane.progress.best,
    }
    return save_adapter(path, trained, spec, about)


def _result(lane: Lane, adapter_bytes: int) -> Result:
    progress = lane.progress
    result = {
        "trial_id": lane.directory.name,
        "status": "diverged" if progress.reason else CUT if progress.cut else "finished",
        "reason": progress.reason,
        "cut": progress.cut,
        "metric": lane.metric,
        "best": progress.best,
        "last": progress.last,
        "steps": progress.step,
        "stopped_early": progress.stopped_early,
        **lane.setup.counts,
        **lane.meter.summary(),
        "adapter_bytes": adapter_bytes,
        "base_bytes": _base_bytes(lane.setup),
        "seed": lane.config.seed,
        "content": dataclasses.asdict(lane.setup.content),
        "command": command_line(),
        "began": lane.meter.began,
        "ended": now(),
        "environment": environment(),
    }
    return finite(result)


def _base_bytes(setup: Setup) -> int:
    frozen, trained = setup.frozen.params["base"], setup.trainable["base"]
    rest = {name: part for name, part in trained.items() if name != HEAD}
    return count_bytes(frozen) + count_bytes(rest)
