"""Reads a trial's newest checkpoint: its own, or its part of a pack's."""

import logging
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from lorax.errors import LoraxError
from lorax.lora import unstack
from lorax.runs.checkpoints import Checkpoints
from lorax.runs.files import write_json
from lorax.runs.trial import POINTER, Trial

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint: arrays and their JSON record.

    Of one trial, `arrays` are `{"state": ..., "best": ...}` in its own shapes. Of a pack, they are
    stacked leaves by path, and `record["lanes"]` holds each trial's record by its id.
    """

    arrays: Any
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        lanes = self.record.get("lanes")
        records = lanes.values() if lanes else [self.record]
        return max(record["progress"]["step"] for record in records)


Packs = dict[Path, Restored | None]  # checkpoints of packs that were already read, by folder


def restore(trial: Trial, like: Any, packs: Packs | None = None) -> Restored | None:
    """The newest checkpoint of a trial; None without one.

    A pack keeps one checkpoint for all of its trials, padded and stacked. Each trial's directory
    points to it, so a trial can also resume alone or in another pack.

    Args:
      trial: locked by this process.
      like: `{"state": ..., "best": ...}` of the trial's own structure and shapes.
      packs: a cache, which this function fills.
    """
    packs = {} if packs is None else packs
    found = [x for x in (_own(trial, like), _in_its_pack(trial, like, packs)) if x]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def point_to(trial: Trial, checkpoints: Path) -> None:
    """Record in a trial's directory which pack's checkpoints hold it."""
    if trial.pack_checkpoints() != checkpoints:
        write_json(trial.directory / POINTER, {"checkpoints": str(checkpoints.absolute())})


def read_pack(folder: Path) -> Restored | None:
    """The newest checkpoint of a pack; None without one."""
    if not folder.is_dir():
        return None
    with closing(Checkpoints(folder)) as checkpoints:
        found = checkpoints.restore_flat()
    return Restored(*found) if found else None


def trial_in_pack(pack: Restored, name: str, like: Any) -> Restored:
    """A trial's own part of a pack's checkpoint.

    Args:
      pack: of `read_pack`.
      name: the trial's id.
      like: as in `restore`.

    Raises:
      LoraxError: a checkpoint of other shapes than `like`.
    """
    record = pack.record["lanes"][name]
    return Restored(unstack(pack.arrays, record["index"], like), record)


def _own(trial: Trial, like: Any) -> Restored | None:
    if not trial.checkpoints.is_dir():
        return None
    with closing(Checkpoints(trial.checkpoints)) as checkpoints:
        found = checkpoints.restore(like)
    return Restored(*found) if found else None


def _in_its_pack(trial: Trial, like: Any, packs: Packs) -> Restored | None:
    folder = trial.pack_checkpoints()
    if folder is None:
        return None
    if folder not in packs:
        packs[folder] = read_pack(folder)
    pack = packs[folder]
    if pack is None or trial.id not in pack.record["lanes"]:
        return None
    try:
        return trial_in_pack(pack, trial.id, like)
    except LoraxError as fault:
        log.warning("%s: the pack's checkpoint does not fit the trial: %s", trial.directory, fault)
        return None
