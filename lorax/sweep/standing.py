"""Where the trials of a pack stand, and so where it goes on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.sweep.pack import Pack, is_open
from lorax.train.content import check_record
from lorax.train.lane import Progress
from lorax.train.measure import Meter
from lorax.train.restore import Found, lane_of, own_steps, pointed_to, read_pack
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import init_state
from lorax.train.trial import Start, find_start
from lorax.trial_id import trial_dir


class Leg(NamedTuple):
    """Lanes that go on together.

    Attributes:
      pack: in which; it may have more trials, which have ended.
      trials: of the lanes, in order.
      starts: where each stands.
      step: after how many optimizer steps.
    """

    pack: Pack
    trials: tuple[TrialConfig, ...]
    starts: list[Start]
    step: int


def legs_of(pack: Pack) -> list[Leg]:
    """How the open trials of a pack go on: in one leg, or in one for each step they stand at.

    From the pack's own checkpoint, and from its beginning, trials that have ended keep their
    lanes: the program, and so every bit, is the same as before.
    """
    if found := checkpoint_of(pack):
        members = members_of(pack, found)
        starts = [start_in(pack, found, trial) for trial in members]
        return [Leg(pack, members, starts, step_of(found))]
    packs: dict[Path, Any] = {}
    starts_by_trial = {
        trial_dir(trial): find_start(trial, trial_dir(trial), packs)
        for trial in pack.trials
        if is_open(trial)
    }
    steps = sorted({start.progress.step for start in starts_by_trial.values()})
    if steps == [0]:
        starts = [starts_by_trial.get(trial_dir(t)) or beginning(t) for t in pack.trials]
        return [Leg(pack, pack.trials, starts, 0)]
    return [_leg_at(step, pack, starts_by_trial) for step in steps]


def _leg_at(step: int, pack: Pack, starts: dict[Path, Start]) -> Leg:
    there = {path for path, start in starts.items() if start.progress.step == step}
    trials = tuple(trial for trial in pack.trials if trial_dir(trial) in there)
    part = replace(pack, trials=trials)
    return Leg(part, trials, [starts[trial_dir(trial)] for trial in trials], step)


def checkpoint_of(pack: Pack) -> Found | None:
    """The checkpoint that a pack goes on from as it was; None when a trial stands elsewhere."""
    found = read_pack(pack.checkpoints) if pack.checkpoints.is_dir() else None
    if found is None:
        return None
    opened = [trial for trial in members_of(pack, found) if is_open(trial)]
    return found if all(_stands_in(pack, step_of(found), trial) for trial in opened) else None


def step_of(found: Found) -> int:
    """Optimizer steps done at a checkpoint of a pack."""
    return max(lane["progress"]["step"] for lane in found[1]["lanes"].values())


def members_of(pack: Pack, found: Found) -> tuple[TrialConfig, ...]:
    """The trials in a checkpoint's lanes, in their order; a pack may have shrunk before it."""
    trials = dict(zip(pack.ids, pack.trials, strict=True))
    lanes = sorted(found[1]["lanes"].items(), key=lambda item: item[1]["index"])
    return tuple(trials[name] for name, _ in lanes)


def _stands_in(pack: Pack, step: int, trial: TrialConfig) -> bool:
    """False if a trial went on by itself or in another pack since, or was deleted."""
    directory = trial_dir(trial)
    place = pointed_to(directory)
    is_here = place is None or place == pack.checkpoints.absolute() or not place.is_dir()
    has_records = (directory / "metrics.jsonl").exists()
    return is_here and has_records and max(own_steps(directory), default=0) <= step


def beginning(trial: TrialConfig) -> Start:
    """A trial's start at its first step."""
    setup = prepare(trial)
    state = init_state(setup.trainable, hyper_of(trial), setup.dropout_key)
    return Start(setup, state, jax.tree.map(np.asarray, state.trainable), Progress(), Meter())


def start_in(pack: Pack, found: Found, trial: TrialConfig) -> Start:
    """A trial's start at its place in a pack's checkpoint.

    Raises:
      LoraxError: a checkpoint of other shapes, or of another content of the trial's data or base.
    """
    start = beginning(trial)
    try:
        like = {"state": start.state, "best": start.best}
        arrays, record = lane_of(found, trial_dir(trial).name, like)
    except LoraxError as fault:
        where = f"{pack.checkpoints} does not fit its trials ({fault})"
        raise LoraxError(f"{where}; delete {pack.directory} to start over") from None
    check_record(trial, trial_dir(trial), record, start.setup.content)
    progress = Progress(**record["progress"])
    if trial.sweep.halving.after is None:
        progress.cut = None  # cut by an earlier command; now it goes on
    meter = Meter.restore(record["costs"])
    return Start(start.setup, arrays["state"], arrays["best"], progress, meter)
