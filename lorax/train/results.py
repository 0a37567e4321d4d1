"""`result.json` and `adapter/`: what a trial leaves when it has ended."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lorax.checkpoint import save_adapter, write_json
from lorax.errors import LoraxError
from lorax.lora import count_bytes, unpad
from lorax.tracking import finite
from lorax.train.lane import Lane
from lorax.train.measure import environment
from lorax.train.setup import HEAD, Setup
from lorax.trial_id import trial_id

Result = dict[str, Any]
CUT = "cut"


def read_result(directory: Path) -> Result | None:
    """The result of a trial that has ended; None while it has not.

    Raises:
      LoraxError: a file that is there and not JSON.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as fault:
        raise LoraxError(f"{path} is damaged ({fault}); delete it to run the trial again") from None


def finished_result(directory: Path) -> Result | None:
    """As `read_result`, but None for a trial that halving cut: it can go on."""
    result = read_result(directory)
    return None if result and result["status"] == CUT else result


def write_result(lane: Lane) -> Result:
    """Write a lane's adapter, as its best evaluation saw it, and its result; end its tracker."""
    adapter = lane.directory / "adapter"
    adapter_bytes = _save_adapter(adapter, lane)
    result = _result(lane, adapter_bytes)
    write_json(lane.directory / "result.json", result)
    lane.tracker.finish(result, adapter)
    return result


def _save_adapter(path: Path, lane: Lane) -> int:
    """Keep the best evaluation's trained part, at its true rank."""
    trained, spec = lane.best, lane.setup.spec
    if spec:
        ranks = {target: spec.rank_of(target) for target in trained["lora"]}
        trained = {**trained, "lora": unpad(trained["lora"], ranks)}
    stored = {name: getattr(lane.config.train, name) for name in ("precision", "base_dtype")}
    about = {"base": dataclasses.asdict(lane.config.model), **stored, "best": lane.progress.best}
    return save_adapter(path, trained, spec, about)


def _result(lane: Lane, adapter_bytes: int) -> Result:
    progress = lane.progress
    result = {
        "trial_id": trial_id(lane.config),
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
        "environment": environment(),
    }
    return finite(result)


def _base_bytes(setup: Setup) -> int:
    frozen, trained = setup.frozen.params["base"], setup.trainable["base"]
    rest = {name: part for name, part in trained.items() if name != HEAD}
    return count_bytes(frozen) + count_bytes(rest)
