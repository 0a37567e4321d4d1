"""A pack: trials that share one compiled program, and the plans of packs on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lorax.runs.pack_dir import (
    PACKS,
    PackRecord,
    close_record,
    is_planned,
    pack_dirs,
    read_record,
    write_record,
)
from lorax.runs.trial import CHECKPOINTS, Trial


@dataclass(frozen=True)
class Pack:
    """Trials of one program.

    Attributes:
      trials: in the order of their lanes.
      tokens_at_once: tokens that lanes side by side may have together; see `BatchedEngine`.
      lanes: number of lanes side by side, whatever their tokens.
      predicted: the planner's predictions, for the plan's table.
    """

    trials: tuple[Trial, ...]
    tokens_at_once: int
    lanes: int | None = None
    predicted: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def ids(self) -> list[str]:
        """The ids of the trials, in order."""
        return [trial.id for trial in self.trials]

    @property
    def name(self) -> str:
        """The number of its trials, and a hash of their ids in order.

        The number of lanes side by side is not part of it, as it may change in training.
        """
        content = json.dumps(self.ids)
        return f"{len(self.trials)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    @property
    def directory(self) -> Path:
        """`<sweep>/packs/<name>`."""
        return self.trials[0].sweep_dir / PACKS / self.name

    @property
    def checkpoints(self) -> Path:
        """The folder of the states of all its trials while it trains."""
        return self.directory / CHECKPOINTS

    @property
    def record(self) -> PackRecord:
        """Its record in its directory."""
        return {
            "trials": self.ids,
            "tokens_at_once": self.tokens_at_once,
            "lanes": self.lanes,
            "predicted": self.predicted,
        }

    @property
    def has_begun(self) -> bool:
        """Whether its training has begun, by this command or an earlier one."""
        record = read_record(self.directory)
        return record is not None and not is_planned(record)

    def open_trials(self) -> tuple[Trial, ...]:
        """Its trials that have not ended."""
        return tuple(trial for trial in self.trials if trial.is_open)


def record_plan(packs: Sequence[Pack], trials: Sequence[Trial]) -> None:
    """Record packs before the first one trains, so that the plan survives a kill.

    Earlier plans for the same trials are closed: two plans must not contain one trial. The caller
    holds the lock of the folder of packs.

    Args:
      packs: the plan.
      trials: of the whole sweep.
    """
    names = {name for pack in packs for name in pack.ids}
    for folder in pack_dirs(sweep_dirs(trials)):
        record = read_record(folder)
        if record and is_planned(record) and names & set(record["trials"]):
            close_record(folder, record)
    for pack in packs:
        planned_for = planning_of(pack.trials)
        write_record(pack.directory, {**pack.record, "planned_for": planned_for})


def planning_of(trials: Sequence[Trial]) -> dict[str, Any]:
    """What a pack's plan depends on besides its trials: the sweep's limits, and the devices."""
    sweep = trials[0].config.sweep
    return {
        "max_trials": min(trial.config.sweep.max_trials for trial in trials),
        "lanes": sweep.lanes,
        "memory_limit_gib": sweep.memory_limit_gib,
        "mesh": dataclasses.asdict(sweep.mesh),
        "devices": [device.device_kind for device in jax.devices()],
    }


def recorded_packs(trials: Sequence[Trial]) -> list[Pack]:
    """The packs on disk to train unchanged, if the sweep contains all of their trials.

    These are killed packs, and planned packs whose plan has the same limits and devices and none
    of whose trials has ended since.
    """
    asked = {trial.directory: trial for trial in trials}
    packs = []
    for folder in pack_dirs(sweep_dirs(trials)):
        record = read_record(folder)
        if record is None or record.get("is_over"):
            continue
        places = [folder.parents[1] / name for name in record["trials"]]
        if not places or not asked.keys() >= set(places):
            continue
        members = tuple(asked[place] for place in places)
        pack = Pack(members, record["tokens_at_once"], record["lanes"], record["predicted"])
        if pack.directory == folder and _resumes(pack, record):
            packs.append(pack)
    return packs


def sweep_dirs(trials: Sequence[Trial]) -> list[Path]:
    """The directories of the trials' sweeps."""
    return list(dict.fromkeys(trial.sweep_dir for trial in trials))


def _resumes(pack: Pack, record: PackRecord) -> bool:
    if is_planned(record):
        is_same = record["planned_for"] == planning_of(pack.trials)
        return is_same and len(pack.open_trials()) == len(pack.trials)
    return bool(pack.open_trials())
