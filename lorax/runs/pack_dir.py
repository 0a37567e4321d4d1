"""The directory of a pack: its record, and its checkpoints while it trains.

`<sweep>/packs/<name>/pack.json` lists the trials that share a program, so that the same command
resumes with the same program after a kill.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from lorax.runs.files import write_json
from lorax.runs.lock import BusyError, locked
from lorax.runs.results import PRUNED, sound_result
from lorax.runs.trial import CHECKPOINTS, pointed_to

PACKS = "packs"
RECORD = "pack.json"
REQUIRED = {"trials": list, "tokens_at_once": int, "lanes": int | None, "predicted": dict}


class PackRecord(TypedDict):
    """The content of `pack.json`.

    Attributes:
      trials: ids, in the order of their lanes.
      tokens_at_once: see `BatchedEngine`.
      lanes: see `BatchedEngine`.
      predicted: the planner's predictions.
      planned_for: the limits and devices that the plan assumes; absent once training has begun.
      is_over: it has ended, or another pack has replaced it.
      measured: its measured costs.
    """

    trials: list[str]
    tokens_at_once: int
    lanes: int | None
    predicted: dict[str, Any]
    planned_for: NotRequired[dict[str, Any]]
    is_over: NotRequired[bool]
    measured: NotRequired[dict[str, Any]]


def read_record(folder: Path) -> PackRecord | None:
    """The record of a pack; None without a readable one."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = (
        isinstance(record, dict)
        and all(name in record and isinstance(record[name], REQUIRED[name]) for name in REQUIRED)
        and all(isinstance(name, str) for name in record["trials"])
    )
    return cast(PackRecord, record) if is_whole else None


def write_record(folder: Path, record: PackRecord) -> None:
    """Write the record of a pack; its directory is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record)


def is_planned(record: PackRecord) -> bool:
    """Whether a pack is planned and its training has not begun."""
    return "planned_for" in record and not record.get("is_over")


def close_record(folder: Path, record: PackRecord) -> None:
    """Record that a pack is over."""
    write_record(folder, {**record, "is_over": True})


def pack_dirs(sweeps: Sequence[Path]) -> list[Path]:
    """The directories of all packs of the given sweeps."""
    parents = {sweep / PACKS for sweep in sweeps}
    return sorted(path for parent in parents for path in parent.glob("*") if path.is_dir())


def tidy(sweeps: Sequence[Path]) -> None:
    """Close the packs that no trial resumes from, such as one killed just before its end."""
    for folder in pack_dirs(sweeps):
        record = read_record(folder)
        members = [folder.parents[1] / name for name in record["trials"]] if record else []
        has_checkpoints = (folder / CHECKPOINTS).is_dir()
        if not has_checkpoints and (record is None or _is_closed_or_waits(record, members)):
            continue
        with contextlib.suppress(BusyError), contextlib.ExitStack() as locks:
            for path in (folder, *filter(Path.is_dir, members)):
                locks.enter_context(locked(path))
            if _is_needed(folder, members):
                continue
            if record and not record.get("is_over"):
                close_record(folder, record)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _is_closed_or_waits(record: PackRecord, members: Sequence[Path]) -> bool:
    """Whether a pack is over, or is planned with trials that have not ended."""
    waits = is_planned(record) and any(sound_result(path) is None for path in members)
    return bool(record.get("is_over")) or waits


def _is_needed(folder: Path, members: Sequence[Path]) -> bool:
    """Whether a trial resumes from a pack: one without a result, or a pruned one that continues."""
    checkpoints = folder.absolute() / CHECKPOINTS
    for path in folder.parents[1].iterdir():
        result = sound_result(path)
        if result is None and path in members:
            return True
        if result and result["status"] == PRUNED and pointed_to(path) == checkpoints:
            return True
    return False
