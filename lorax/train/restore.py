"""Where a trial goes on from: its own newest checkpoint, or its place in a pack's."""

import json
import logging
from pathlib import Path
from typing import Any

from lorax.checkpoint import Checkpoints, write_json
from lorax.errors import LoraxError
from lorax.lora import unstack

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
POINTER = "packed.json"
RESULT = "result.json"
Found = tuple[Any, dict[str, Any]]


def restore(directory: Path, like: Any, packs: dict[Path, Any] | None = None) -> Found | None:
    """The newest (arrays, record) that a trial has; None when it has none.

    A pack keeps one checkpoint for all of its trials, padded and stacked; each trial's directory
    points to it, so that a trial goes on alone, or in another pack, as well.

    Args:
      directory: the trial's.
      like: `{"state": ..., "best": ...}` of the trial's own structure and shapes.
      packs: what has been read already, by folder; filled in.
    """
    found = [own for own in (_own(directory, like), _packed(directory, like, packs)) if own]
    return max(found, key=lambda pair: pair[1]["progress"]["step"], default=None)


def has_started(directory: Path) -> bool:
    """Whether a trial has a result, or a checkpoint to go on from."""
    return any((directory / name).exists() for name in (RESULT, CHECKPOINTS, POINTER))


def point_to(directory: Path, checkpoints: Path) -> None:
    """Note in a trial's directory which pack's checkpoints it is in."""
    if pointed_to(directory) != checkpoints:
        write_json(directory / POINTER, {"checkpoints": str(checkpoints.absolute())})


def pointed_to(directory: Path) -> Path | None:
    """The folder of the pack's checkpoints that hold this trial, if any.

    It is looked for beside the trial's sweep, so that an output directory may move.
    """
    try:
        noted = Path(json.loads((directory / POINTER).read_text())["checkpoints"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return directory.absolute().parent / Path(*noted.parts[-3:])


def _own(directory: Path, like: Any) -> Found | None:
    if not (directory / CHECKPOINTS).is_dir():
        return None
    checkpoints = Checkpoints(directory / CHECKPOINTS)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def _packed(directory: Path, like: Any, packs: dict[Path, Any] | None) -> Found | None:
    folder = pointed_to(directory)
    if folder is None or not folder.is_dir():
        return None
    packs = {} if packs is None else packs
    if folder not in packs:
        packs[folder] = read_pack(folder)
    found = packs[folder]
    if found is None or directory.name not in found[1]["lanes"]:
        return None
    try:
        return lane_of(found, directory.name, like)
    except LoraxError as fault:
        log.warning("%s: the pack's checkpoint does not fit the trial: %s", directory, fault)
        return None


def lane_of(found: Found, name: str, like: Any) -> Found:
    """A trial's own (arrays, record) in a pack's checkpoint.

    Raises:
      LoraxError: a checkpoint of other shapes than `like`.
    """
    lane = found[1]["lanes"][name]
    return unstack(found[0], lane["index"], like), lane


def own_steps(directory: Path) -> list[int]:
    """The steps at which a trial has checkpoints of its own."""
    names = (path.name for path in (directory / CHECKPOINTS).glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def read_pack(folder: Path) -> Found | None:
    """The newest checkpoint of a pack: (stacked leaves by path, record of its lanes)."""
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore_flat()
    finally:
        checkpoints.close()
