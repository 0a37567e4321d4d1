"""A whole sweep in packs: planned, trained, shared with other processes."""

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm.contrib.logging import logging_redirect_tqdm

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lock import is_free, locked
from lorax.sweep.cost import epoch_of, steps_of
from lorax.sweep.engine import mesh_of
from lorax.sweep.groups import group_trials, why_apart
from lorax.sweep.pack import (
    Pack,
    ended_result,
    is_open,
    left_out,
    record_plan,
    recorded_packs,
    tidy,
    without_damaged,
)
from lorax.sweep.planner import plan_packs
from lorax.sweep.runner import run_pack
from lorax.sweep.serial import check_trials
from lorax.sweep.words import counted
from lorax.train.trial import track_end, writing
from lorax.trial_id import trial_dir

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0


def run_packed(trials: Sequence[TrialConfig]) -> list[dict[str, Any]]:
    """Check every trial, then train all in as few programs as possible; ended ones are skipped.

    A trial whose result on disk is damaged is left out; the others are trained.

    Several processes may be started on the same trials: each pack is trained by one of them, and
    each waits at the end for what others hold, and takes over what they leave when they die.

    Returns:
      Their results, in order, as of `lorax.train.run_trial`; with `sweep.halving`, some of
      status `cut`.

    Raises:
      LoraxError: a trial that cannot run, before any has been trained; a directory that cannot
        be written; a single trial that does not fit in memory; in the end, a damaged result.
    """
    results = run_sound(trials)
    for result in results:
        if isinstance(result, LoraxError):
            raise result
    return [result for result in results if not isinstance(result, LoraxError)]


def run_sound(trials: Sequence[TrialConfig]) -> list[dict[str, Any] | LoraxError]:
    """As `run_packed`, with a fault in the place of each result that is damaged."""
    unique, damaged = without_damaged(checked(trials))
    track_ends(unique)
    tell_why_apart(unique)
    is_waiting = False
    while pending := [trial for trial in unique if is_open(trial)]:
        with logging_redirect_tqdm():
            trained = [run_pack(pack) for pack in packs_to_run(unique)]
        if any(trained):
            continue
        if not is_waiting:
            log.info("another process trains %d of the trials; waiting for it", len(pending))
        is_waiting = True
        time.sleep(POLL_SECONDS)
    with contextlib.suppress(OSError):  # what is left over does no harm
        tidy(unique)
    fault = left_out(damaged) if damaged else None
    return [fault if fault and trial_dir(t) in damaged else _result(t) for t in trials]


def checked(trials: Sequence[TrialConfig], *, devices_are_here: bool = True) -> list[TrialConfig]:
    """The trials of a sweep that can run, each once.

    Args:
      trials: as they were asked for.
      devices_are_here: False where other processes train them, on devices of their own.

    Raises:
      LoraxError: settings or a trial that cannot run.
    """
    check_sweep(trials)
    check_trials(trials, devices_are_here=devices_are_here)
    for trial in trials:
        _check_halving(trial)
    if devices_are_here:
        for trial in trials:
            mesh_of(trial)
    unique = list({trial_dir(trial): trial for trial in trials}.values())
    if len(unique) < len(trials):
        doubles = len(trials) - len(unique)
        log.info("%d of %s repeat others", doubles, counted(len(trials), "trial"))
    return unique


def track_ends(trials: Sequence[TrialConfig]) -> None:
    """Send trackers what they have missed of the trials that have ended already."""
    for trial in trials:
        if not is_open(trial):
            track_end(trial)


def tell_why_apart(trials: Sequence[TrialConfig]) -> None:
    """Log why trials that are still to be trained cannot all share a program."""
    opened = [trial for trial in trials if is_open(trial)]
    if reason := why_apart(opened):
        count = len(group_trials(opened))
        log.info("%s, as the trials differ in %s", counted(count, "program"), reason)


def packs_to_run(trials: Sequence[TrialConfig]) -> list[Pack]:
    """The packs on record, as they were; then the rest of the open trials, planned and recorded.

    What another process trains alone is left out. Processes that start at once may plan the same
    trials: the plan that is recorded first is the plan of all.

    Raises:
      LoraxError: a directory that cannot be written; a single trial that does not fit in memory.
    """
    while True:
        known = recorded_packs(trials)
        taken = _places(known)
        rest = [trial for trial in trials if is_open(trial) and trial_dir(trial) not in taken]
        rest = [trial for trial in rest if is_free(trial_dir(trial))]
        groups = [[rest[n] for n in group] for group in group_trials(rest)]
        if rest:
            log.info("planning %s: compiling programs", counted(len(rest), "trial"))
        planned = [pack for group in groups for pack in plan_packs(group)]
        if not planned or _recorded(planned, trials):
            return [*known, *planned]


def _recorded(planned: Sequence[Pack], trials: Sequence[TrialConfig]) -> bool:
    """Record a plan; False if another process has recorded one with some of its trials."""
    place = planned[0].directory.parent
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place, waits=True):
            if _places(planned) & _places(recorded_packs(trials)):
                return False
            record_plan(planned, trials)
            return True


def _places(packs: Sequence[Pack]) -> set[Path]:
    return {trial_dir(trial) for pack in packs for trial in pack.trials}


def check_sweep(trials: Sequence[TrialConfig]) -> None:
    """Refuse settings of the sweep that are out of range or not the same for all trials.

    Raises:
      LoraxError: naming the key, its value and what would be right.
    """
    if jax.process_count() > 1:
        raise LoraxError(
            "a sweep does not run in several jax.distributed processes; start each on its own, "
            "on one sweep directory: they share the trials"
        )
    for trial in trials:
        sweep = trial.sweep
        for name in ("halving", "mesh", "lanes", "memory_limit_gib"):
            if getattr(sweep, name) != getattr(trials[0].sweep, name):
                raise LoraxError(f"sweep.{name} must be the same for all trials of a sweep")
        for name, value in (
            ("max_trials", sweep.max_trials),
            ("lanes", sweep.lanes),
            ("halving.after", sweep.halving.after),
            ("mesh.trial", sweep.mesh.trial),
            ("mesh.data", sweep.mesh.data),
            ("mesh.fsdp", sweep.mesh.fsdp),
        ):
            if value is not None and value < 1:
                raise LoraxError(f"sweep.{name}={value} is not a whole number of at least 1")
        if sweep.halving.eta < 2:
            raise LoraxError(f"sweep.halving.eta={sweep.halving.eta} is below 2")
        limit = sweep.memory_limit_gib
        if limit is not None and not limit > 0:
            raise LoraxError(f"sweep.memory_limit_gib={limit} is not a positive number")


def _check_halving(trial: TrialConfig) -> None:
    after, every = trial.sweep.halving.after, trial.train.eval_every or epoch_of(trial)
    if after is None:
        return
    first, total = math.ceil(after / every) * every, steps_of(trial)
    if first >= total:
        remedy = "sweep.halving.after" if every < total <= after else "train.eval_every"
        raise LoraxError(
            f"sweep.halving.after={after} would cut nothing: trials are evaluated every {every} "
            f"steps and trained for {total}; lower {remedy}"
        )


def _result(trial: TrialConfig) -> dict[str, Any]:
    result = ended_result(trial)
    assert result is not None
    return result
