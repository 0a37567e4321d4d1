"""A pack: trials that share one program, and what the disk knows of it."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lorax.checkpoint import write_json
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lock import BusyError, locked
from lorax.sweep.words import counted
from lorax.tracking import METRICS, read_jsonl
from lorax.train.restore import CHECKPOINTS, has_started, pointed_to
from lorax.train.results import CUT, finished_result, read_result, sound_result
from lorax.trial_id import sweep_dir, trial_dir

log = logging.getLogger(__name__)
PACKS = "packs"
RECORD = {"trials": list, "tokens_at_once": int, "lanes": int | None, "predicted": dict}


@dataclass(frozen=True)
class Pack:
    """Trials of one program.

    Attributes:
      trials: in the order of their lanes.
      tokens_at_once: how many lanes are computed side by side; see `PackEngine`.
      lanes: so many side by side, whatever their tokens.
      predicted: what the planner expects; for the plan's table.
    """

    trials: tuple[TrialConfig, ...]
    tokens_at_once: int
    lanes: int | None = None
    predicted: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def ids(self) -> list[str]:
        """The names of the trials' directories, in order."""
        return [trial_dir(trial).name for trial in self.trials]

    @property
    def name(self) -> str:
        """Its trials, in order; how many are side by side may change while it runs."""
        content = json.dumps(self.ids)
        return f"{len(self.trials)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @property
    def directory(self) -> Path:
        """`<sweep>/packs/<name>`."""
        return sweep_dir(self.trials[0]) / PACKS / self.name

    @property
    def checkpoints(self) -> Path:
        """Where the states of all of its trials are kept while it runs."""
        return self.directory / "checkpoints"


def write_record(pack: Pack, **more: Any) -> None:
    """Note a pack, so that the same command goes on with the same program after a kill."""
    pack.directory.mkdir(parents=True, exist_ok=True)
    record = {
        "trials": pack.ids,
        "tokens_at_once": pack.tokens_at_once,
        "lanes": pack.lanes,
        "predicted": pack.predicted,
        **more,
    }
    write_json(pack.directory / "pack.json", record)


def record_plan(packs: Sequence[Pack], trials: Sequence[TrialConfig]) -> None:
    """Note packs before the first of them trains, so that a kill leaves the plan of the rest.

    An earlier plan for the same trials is closed: two plans must not hold one trial. The caller
    holds the lock of the folder of packs.

    Args:
      packs: the plan.
      trials: of the whole sweep.
    """
    names = {name for pack in packs for name in pack.ids}
    for folder in _folders(trials):
        record = read_record(folder)
        if record and is_planned(record) and names & set(record["trials"]):
            write_json(folder / "pack.json", {**record, "is_over": True})
    for pack in packs:
        write_record(pack, planned_for=planning_of(pack.trials))


def planning_of(trials: Sequence[TrialConfig]) -> dict[str, Any]:
    """What the plan of a pack rests on besides its trials: limits of the sweep, and devices."""
    sweep = trials[0].sweep
    return {
        "max_trials": min(trial.sweep.max_trials for trial in trials),
        "lanes": sweep.lanes,
        "memory_limit_gib": sweep.memory_limit_gib,
        "mesh": dataclasses.asdict(sweep.mesh),
        "devices": [device.device_kind for device in jax.devices()],
    }


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a pack; None without a readable one."""
    try:
        record = json.loads((directory / "pack.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = (
        isinstance(record, dict)
        and all(name in record and isinstance(record[name], RECORD[name]) for name in RECORD)
        and all(isinstance(name, str) for name in record["trials"])
    )
    return record if is_whole else None


def is_planned(record: dict[str, Any]) -> bool:
    """Whether a pack is planned, and its training has not begun."""
    return "planned_for" in record and not record.get("is_over")


def recorded_packs(trials: Sequence[TrialConfig]) -> list[Pack]:
    """The packs on disk that are to be trained as they were, all of whose trials are asked for.

    These are packs that were cut short, and planned ones of which no trial has ended since, as
    long as the plan rests on the same limits and devices.
    """
    asked = {trial_dir(trial): trial for trial in trials}
    packs = []
    for folder in _folders(trials):
        record = read_record(folder)
        if record is None or record.get("is_over"):
            continue
        places = [folder.parents[1] / name for name in record["trials"]]
        if not places or not asked.keys() >= set(places):
            continue
        members = tuple(asked[place] for place in places)
        pack = Pack(members, record["tokens_at_once"], record["lanes"], record["predicted"])
        if pack.directory == folder and _goes_on(pack, record):
            packs.append(pack)
    return packs


def _goes_on(pack: Pack, record: dict[str, Any]) -> bool:
    if is_planned(record):
        is_same = record["planned_for"] == planning_of(pack.trials)
        return is_same and all(map(is_open, pack.trials))
    return any(map(is_open, pack.trials))


def tidy(trials: Sequence[TrialConfig]) -> None:
    """Close the packs that no trial goes on from; a kill just before a pack's end leaves such."""
    for folder in _folders(trials):
        record = read_record(folder) or {"trials": [], "is_over": True}
        members = [folder.parents[1] / name for name in record["trials"]]
        has_checkpoints = (folder / CHECKPOINTS).is_dir()
        if not has_checkpoints and (record.get("is_over") or _still_waits(record, members)):
            continue
        with contextlib.suppress(BusyError), contextlib.ExitStack() as locks:
            for path in (folder, *filter(Path.is_dir, members)):
                locks.enter_context(locked(path))
            if _is_needed(folder, members):
                continue
            if not record.get("is_over"):
                write_json(folder / "pack.json", {**record, "is_over": True})
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _still_waits(record: dict[str, Any], members: Sequence[Path]) -> bool:
    """Whether a pack is planned by some command that will train its trials."""
    return is_planned(record) and any(sound_result(path) is None for path in members)


def _is_needed(folder: Path, members: Sequence[Path]) -> bool:
    """Whether a trial goes on from a pack: one without a result, or one cut that has gone on."""
    checkpoints = folder.absolute() / CHECKPOINTS
    return any(
        path in members if sound_result(path) is None else pointed_to(path) == checkpoints
        for path in folder.parents[1].iterdir()
        if (sound_result(path) or {"status": CUT})["status"] == CUT
    )


def _folders(trials: Sequence[TrialConfig]) -> list[Path]:
    parents = {sweep_dir(trial) / PACKS for trial in trials}
    return sorted(path for parent in parents for path in parent.glob("*") if path.is_dir())


def without_damaged(
    trials: Sequence[TrialConfig],
) -> tuple[list[TrialConfig], dict[Path, LoraxError]]:
    """The trials whose files are sound or still to come, and faults by the others' directories.

    A trial without a result needs sound records where it goes on from a checkpoint.

    The faults are logged, so that the trials can be mended while the others are trained.
    """
    sound, damaged = [], {}
    for trial in trials:
        try:
            directory = trial_dir(trial)
            if read_result(directory) is None and has_started(directory):
                read_jsonl(directory / METRICS)
            sound.append(trial)
        except LoraxError as fault:
            log.warning("left out: %s", fault)
            damaged[trial_dir(trial)] = fault
    return sound, damaged


def left_out(damaged: dict[Path, LoraxError]) -> LoraxError:
    """One fault for trials that a sweep has left out, as their results are damaged."""
    first, *others = damaged.values()
    verb = "is" if len(others) == 1 else "are"
    more = f"; so {verb} {counted(len(others), 'other result')} of this sweep" if others else ""
    return LoraxError(f"{first}{more}")


def is_open(trial: TrialConfig) -> bool:
    """Whether a trial has not ended yet."""
    return ended_result(trial) is None


def ended_result(trial: TrialConfig) -> dict[str, Any] | None:
    """A trial's result; None while it is to go on, as one does that an earlier halving cut."""
    directory = trial_dir(trial)
    is_halving = trial.sweep.halving.after is not None
    return read_result(directory) if is_halving else finished_result(directory)
