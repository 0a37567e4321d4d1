"""A whole sweep in packs: planned, trained, shared with other processes."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.sweep.engine import mesh_of
from lorax.sweep.groups import group_trials, why_apart
from lorax.sweep.pack import Pack, ended_result, is_open, recorded_packs, tidy
from lorax.sweep.planner import plan_packs
from lorax.sweep.runner import run_pack
from lorax.sweep.serial import check_trials
from lorax.trial_id import trial_dir

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0


def run_packed(trials: Sequence[TrialConfig]) -> list[dict[str, Any]]:
    """Check every trial, then train all in as few programs as possible; ended ones are skipped.

    Several processes may be started on the same trials: each pack is trained by one of them, and
    each waits at the end for what others hold, and takes over what they leave when they die.

    Returns:
      Their results, in order, as of `lorax.train.run_trial`; with `sweep.halving`, some of
      status `cut`.

    Raises:
      LoraxError: a trial that cannot run, before any has been trained; a directory that cannot
        be written; a single trial that does not fit in memory.
    """
    check_sweep(trials)
    for trial in trials:
        mesh_of(trial)
    check_trials(trials)
    unique = list({trial_dir(trial): trial for trial in trials}.values())
    is_waiting = False
    while pending := [trial for trial in unique if is_open(trial)]:
        packs = packs_to_run(unique)
        if reason := why_apart(pending):
            log.info("%d packs, as their trials differ in %s", len(packs), reason)
        with logging_redirect_tqdm():
            trained = [run_pack(pack) for pack in packs]
        if any(trained):
            continue
        if not is_waiting:
            log.info("another process trains %d of the trials; waiting for it", len(pending))
        is_waiting = True
        time.sleep(POLL_SECONDS)
    tidy(trials)
    return [_result(trial) for trial in trials]


def packs_to_run(trials: Sequence[TrialConfig]) -> list[Pack]:
    """The packs that were cut short, as they were; then the rest of the open trials, planned."""
    known = recorded_packs(trials)
    taken = {trial_dir(trial) for pack in known for trial in pack.trials}
    rest = [trial for trial in trials if is_open(trial) and trial_dir(trial) not in taken]
    groups = [[rest[n] for n in group] for group in group_trials(rest)]
    return [*known, *(pack for group in groups for pack in plan_packs(group))]


def check_sweep(trials: Sequence[TrialConfig]) -> None:
    """Refuse settings of the sweep that are out of range or not the same for all trials.

    Raises:
      LoraxError: naming the key, its value and what would be right.
    """
    for trial in trials:
        sweep = trial.sweep
        if (sweep.halving, sweep.mesh) != (trials[0].sweep.halving, trials[0].sweep.mesh):
            raise LoraxError("sweep.halving and sweep.mesh must be the same for all trials")
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


def _result(trial: TrialConfig) -> dict[str, Any]:
    result = ended_result(trial)
    assert result is not None
    return result
