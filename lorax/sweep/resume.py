"""The checkpoints that the trials of a pack resume from."""

from dataclasses import replace
from typing import NamedTuple

from lorax.errors import LoraxError
from lorax.runs.restore import Packs, Restored, read_pack, trial_in_pack
from lorax.runs.trial import Trial
from lorax.sweep.pack import Pack
from lorax.train.start import Start, find_start, first_start, resume_from


class Resumption(NamedTuple):
    """Trials that train together from one step.

    Attributes:
      pack: the pack they train in; its other trials have ended.
      trials: those with a lane, in order.
      starts: where each of them starts.
      step: optimizer steps done.
    """

    pack: Pack
    trials: tuple[Trial, ...]
    starts: list[Start]
    step: int


def resumptions_of(pack: Pack) -> list[Resumption]:
    """How the open trials of a pack resume: together, or one group for each step they are at.

    If the pack resumes from its own checkpoint or from its beginning, ended trials keep their
    lanes: the program, and therefore every bit, is the same as before.
    """
    if found := _own_checkpoint(pack):
        members = _members(pack, found)
        starts = [_start_in_pack(pack, found, trial) for trial in members]
        return [Resumption(pack, members, starts, found.step)]
    packs: Packs = {}
    starts_by_trial = {trial: find_start(trial, packs) for trial in pack.open_trials()}
    steps = sorted({start.progress.step for start in starts_by_trial.values()})
    if steps == [0]:
        starts = [starts_by_trial.get(t) or first_start(t.config) for t in pack.trials]
        return [Resumption(pack, pack.trials, starts, 0)]
    return [_at_step(step, pack, starts_by_trial) for step in steps]


def _at_step(step: int, pack: Pack, starts: dict[Trial, Start]) -> Resumption:
    trials = tuple(t for t in pack.trials if t in starts and starts[t].progress.step == step)
    return Resumption(replace(pack, trials=trials), trials, [starts[t] for t in trials], step)


def _own_checkpoint(pack: Pack) -> Restored | None:
    """The pack's newest checkpoint; None if one of its open trials has progressed elsewhere."""
    found = read_pack(pack.checkpoints)
    if found is None:
        return None
    opened = [trial for trial in _members(pack, found) if trial.is_open]
    return found if all(_is_newest(pack, found.step, trial) for trial in opened) else None


def _members(pack: Pack, found: Restored) -> tuple[Trial, ...]:
    """The trials in a checkpoint's lanes, in order; the pack may have shrunk before it."""
    trials = dict(zip(pack.ids, pack.trials, strict=True))
    lanes = sorted(found.record["lanes"].items(), key=lambda item: item[1]["index"])
    return tuple(trials[name] for name, _ in lanes)


def _is_newest(pack: Pack, step: int, trial: Trial) -> bool:
    """Whether a trial has not progressed elsewhere since the step, and was not deleted."""
    place = trial.pack_checkpoints()
    is_here = place is None or place == pack.checkpoints.absolute() or not place.is_dir()
    return is_here and trial.metrics.exists() and max(trial.own_steps(), default=0) <= step


def _start_in_pack(pack: Pack, found: Restored, trial: Trial) -> Start:
    """A trial's start, from its part of the pack's checkpoint.

    Raises:
      LoraxError: a checkpoint of other shapes, or of other content of the trial's data or base.
    """
    start = first_start(trial.config)
    try:
        own = trial_in_pack(found, trial.id, start.like)
    except LoraxError as fault:
        where = f"{pack.checkpoints} does not fit its trials ({fault})"
        raise LoraxError(f"{where}; delete {pack.directory} to start over") from None
    resumed = resume_from(trial, start, own)
    if trial.config.sweep.halving.after is None:
        resumed.progress.cut = None  # pruned by an earlier command; now it continues
    return resumed
