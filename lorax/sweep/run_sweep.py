"""Plans and trains a whole sweep in packs, together with other processes."""

import contextlib
import logging
import math
import time
from collections.abc import Sequence

import jax
from tqdm.contrib.logging import logging_redirect_tqdm

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.runs.files import writing
from lorax.runs.lock import locked
from lorax.runs.pack_dir import tidy
from lorax.runs.results import Result
from lorax.runs.trackers import catch_up
from lorax.runs.trial import Trial
from lorax.sweep.compatibility import group_trials, why_apart
from lorax.sweep.damaged import left_out, without_damaged
from lorax.sweep.pack import Pack, record_plan, recorded_packs, sweep_dirs
from lorax.sweep.planner import plan_packs
from lorax.sweep.run_pack import run_pack
from lorax.sweep.run_serial import check_trials
from lorax.sweep.words import counted
from lorax.sweep.workload import Workload
from lorax.train.batched_engine import mesh_of

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0


def run_packed(trials: Sequence[TrialConfig]) -> list[Result]:
    """Check every trial, then train all in as few programs as possible; ended ones are skipped.

    A trial whose result on disk is damaged is left out; the others are trained.

    Several processes may train the same trials. Each pack is trained by one of them. At the end
    each process waits for packs that others hold, and takes over the packs of processes that die.

    Returns:
      Their results, in order, as `lorax.train.run_trial` returns them; with `sweep.halving`, some
      have status `cut`.

    Raises:
      LoraxError: a trial cannot run (before any trains); a directory cannot be written; a single
        trial does not fit in memory; at the end, a result is damaged.
    """
    results = run_sound(trials)
    for result in results:
        if isinstance(result, LoraxError):
            raise result
    return [result for result in results if not isinstance(result, LoraxError)]


def run_sound(configs: Sequence[TrialConfig]) -> list[Result | LoraxError]:
    """As `run_packed`, with a fault in place of each damaged result."""
    asked = checked(configs)
    trials, damaged = without_damaged(list(dict.fromkeys(asked)))
    catch_up_all(trials)
    log_why_apart(trials)
    is_waiting = False
    while pending := [trial for trial in trials if trial.is_open]:
        with logging_redirect_tqdm():
            trained = [run_pack(pack) for pack in packs_to_run(trials)]
        if any(trained):
            continue
        if not is_waiting:
            log.info("another process trains %d of the trials; waiting for it", len(pending))
        is_waiting = True
        time.sleep(POLL_SECONDS)
    with contextlib.suppress(OSError):  # leftover files do no harm
        tidy(sweep_dirs(trials))
    fault = left_out(damaged) if damaged else None
    return [fault if fault and trial in damaged else _result(trial) for trial in asked]


def checked(configs: Sequence[TrialConfig], *, devices_are_here: bool = True) -> list[Trial]:
    """The checked trials of a sweep, in order, with duplicates.

    Args:
      configs: of the sweep.
      devices_are_here: False if other processes train them on their own devices.

    Raises:
      LoraxError: invalid settings, or a trial that cannot run.
    """
    check_sweep(configs)
    trials = check_trials(configs, devices_are_here=devices_are_here)
    for config in configs:
        _check_halving(config)
        if devices_are_here:
            mesh_of(config)
    if doubles := len(trials) - len(set(trials)):
        log.info("%d of %s repeat others", doubles, counted(len(trials), "trial"))
    return trials


def catch_up_all(trials: Sequence[Trial]) -> None:
    """Send trackers the missing records of trials that have ended already."""
    for trial in trials:
        if not trial.is_open:
            catch_up(trial)


def log_why_apart(trials: Sequence[Trial]) -> None:
    """Log why the open trials cannot all share a program."""
    opened = [trial.config for trial in trials if trial.is_open]
    if reason := why_apart(opened):
        count = len(group_trials(opened))
        log.info("%s, as the trials differ in %s", counted(count, "program"), reason)


def packs_to_run(trials: Sequence[Trial]) -> list[Pack]:
    """The recorded packs, unchanged, then new recorded packs for the other open trials.

    Trials that another process trains alone are left out. Processes that start at the same time
    may plan the same trials: all of them use the plan that is recorded first.

    Raises:
      LoraxError: a directory cannot be written; a single trial does not fit in memory.
    """
    while True:
        known = recorded_packs(trials)
        taken = _members(known)
        rest = [t for t in trials if t.is_open and t not in taken and t.is_free]
        if rest:
            log.info("planning %s: compiling programs", counted(len(rest), "trial"))
        planned = plan_sweep(rest)
        if not planned or _recorded(planned, trials):
            return [*known, *planned]


def plan_sweep(trials: Sequence[Trial], *, with_times: bool = False) -> list[Pack]:
    """Packs for any trials; see `plan_packs`."""
    groups = group_trials([trial.config for trial in trials])
    chosen = [[trials[n] for n in group] for group in groups]
    return [pack for group in chosen for pack in plan_packs(group, with_times=with_times)]


def _recorded(planned: Sequence[Pack], trials: Sequence[Trial]) -> bool:
    """Record a plan; False if another process has recorded one with some of its trials."""
    place = planned[0].directory.parent
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        with locked(place, waits=True):
            if _members(planned) & _members(recorded_packs(trials)):
                return False
            record_plan(planned, trials)
            return True


def _members(packs: Sequence[Pack]) -> set[Trial]:
    return {trial for pack in packs for trial in pack.trials}


def check_sweep(trials: Sequence[TrialConfig]) -> None:
    """Refuse settings of the sweep that are out of range or not the same for all trials.

    Raises:
      LoraxError: names the key, its value and the valid values.
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
    after = trial.sweep.halving.after
    if after is None:
        return
    work = Workload.of(trial)
    every, total = trial.train.eval_every or work.steps_per_epoch, work.steps
    first = math.ceil(after / every) * every
    if first >= total:
        remedy = "sweep.halving.after" if every < total <= after else "train.eval_every"
        raise LoraxError(
            f"sweep.halving.after={after} would cut nothing: trials are evaluated every {every} "
            f"steps and trained for {total}; lower {remedy}"
        )


def _result(trial: Trial) -> Result:
    result = trial.result()
    assert result is not None
    return result
