"""Trains one pack: locks, lanes, checkpoints, and what is left when it is over."""

import contextlib
import gc
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax.checkpoint import Checkpoints
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lock import BusyError, locked
from lorax.sweep.engine import PackEngine, mesh_of
from lorax.sweep.halving import judge
from lorax.sweep.pack import Pack, is_open, read_record, write_record
from lorax.sweep.standing import beginning, checkpoint_of, members_of, start_in, step_of
from lorax.train.lane import Lane
from lorax.train.loop import Loop
from lorax.train.measure import peak_rss, reset_peak_rss
from lorax.train.restore import CHECKPOINTS, POINTER, own_steps, point_to
from lorax.train.results import finished_result, write_result
from lorax.train.setup import load_dataset
from lorax.train.trial import (
    Start,
    clean,
    find_start,
    open_lane,
    progress_bar,
    run_trial,
    writing,
)
from lorax.trial_id import trial_dir, trial_id

log = logging.getLogger(__name__)


def run_pack(pack: Pack) -> bool:
    """Train the pack's trials that no other process holds; whether there were any.

    A pack on disk that was cut short goes on as it was, with the trials that have ended since
    still in their lanes, so that every number comes out the same to the bit.

    Raises:
      LoraxError: a directory that cannot be written; a single trial that does not fit in memory.
    """
    if len(pack.trials) == 1 and not pack.checkpoints.is_dir():
        return _run_alone(pack)
    with writing(pack.directory), contextlib.ExitStack() as locks:
        if not _take(pack.directory, locks):
            return False
        held = [trial for trial in pack.trials if _take(trial_dir(trial), locks)]
        opened = tuple(trial for trial in held if is_open(trial))
        if opened and len(held) == len(pack.trials) and read_record(pack.directory):
            _train_fitting(pack)
        elif opened:
            _train_fitting(replace(pack, trials=opened))
    return bool(opened)


def _run_alone(pack: Pack) -> bool:
    """A pack of one trial needs no lanes."""
    try:
        result = run_trial(pack.trials[0])
    except BusyError:
        return False
    except (jax.errors.JaxRuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        raise _too_large(pack) from fault
    with writing(pack.directory):
        names = {"seconds": "seconds_total", "memory_bytes": "step_memory_bytes"}
        same = ("seconds_per_step", "compile_seconds", "peak_rss_bytes")
        measured = {name: result[names.get(name, name)] for name in (*names, *same)}
        write_record(pack, is_over=True, measured=measured)
    return True


def _take(directory: Path, locks: contextlib.ExitStack) -> bool:
    directory.mkdir(parents=True, exist_ok=True)
    try:
        locks.enter_context(locked(directory))
    except BusyError:
        return False
    return True


def _train_fitting(pack: Pack) -> None:
    """Train a pack; one that runs out of memory goes on with less at once, from where it stood."""
    side = _out_of_memory_side(pack)
    if side is None:
        return
    gc.collect()
    smaller = smaller_packs(pack, side)
    is_split = smaller[0].name != pack.name
    log.warning(
        "pack %s ran out of memory with %d trials side by side: going on with %s",
        pack.name,
        side,
        "packs of half the size" if is_split else f"{smaller[0].lanes} side by side",
    )
    if is_split:
        write_record(pack, is_over=True)
    for part in smaller:
        _train_fitting(part)
    if is_split:
        shutil.rmtree(pack.checkpoints, ignore_errors=True)


def smaller_packs(pack: Pack, side: int) -> list[Pack]:
    """What goes on in place of a pack that ran out of memory with `side` lanes side by side.

    Raises:
      LoraxError: a single trial.
    """
    if side > 1:
        return [replace(pack, lanes=side // 2)]
    if len(pack.trials) == 1:
        raise _too_large(pack)
    opened = [trial for trial in pack.trials if is_open(trial)]
    half = (len(opened) + 1) // 2
    parts = opened[:half], opened[half:]
    return [replace(pack, trials=tuple(part), lanes=1) for part in parts if part]


def _too_large(pack: Pack) -> LoraxError:
    return LoraxError(
        f"trial {pack.ids[0]} does not fit in memory even alone; lower train.batch_size, "
        "raise train.grad_accum or lower task.max_length"
    )


def _out_of_memory_side(pack: Pack) -> int | None:
    """None when the pack is over; else how many lanes side by side were too many."""
    if found := checkpoint_of(pack):
        members = members_of(pack, found)
        if any(is_open(trial) for trial in members):
            starts = [start_in(pack, found, trial) for trial in members]
            return _train(pack, members, starts, step_of(found))
        _close(pack)
        return None
    packs: dict[Path, Any] = {}
    starts = [
        find_start(trial, trial_dir(trial), packs) if is_open(trial) else beginning(trial)
        for trial in pack.trials
    ]
    opened = [pair for pair in zip(pack.trials, starts, strict=True) if is_open(pair[0])]
    steps = sorted({start.progress.step for _, start in opened})
    if len(steps) == 1:
        shutil.rmtree(pack.checkpoints, ignore_errors=True)  # of trials that are elsewhere now
        return _train(pack, pack.trials, starts, steps[0])
    for step in steps:  # trials that come from different places go on in packs of their own
        part = tuple(trial for trial, start in opened if start.progress.step == step)
        _train_fitting(replace(pack, trials=part))
    return None


def _train(
    pack: Pack, members: Sequence[TrialConfig], starts: Sequence[Start], step: int
) -> int | None:
    reset_peak_rss()
    lanes = [_lane(trial, start) for trial, start in zip(members, starts, strict=True)]
    for lane in lanes:
        lane.meter.share(len(lanes))
    write_record(pack)
    checkpoints = Checkpoints(pack.checkpoints)
    if step:
        log.info("pack %s goes on from step %d of %d", pack.name, step, lanes[0].total_steps)
    started, engine = time.perf_counter(), None
    try:
        engine = _engine(pack, starts)
        loop = _loop(lanes, engine, checkpoints, step)
        with progress_bar(members, loop) as bar:
            loop.run(bar)
    except (jax.errors.JaxRuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        return engine.side if engine else 1
    finally:
        checkpoints.close()
        for lane in lanes:
            if not lane.has_ended:
                lane.tracker.close()
    _close(pack, measured=_measured(engine, loop, started))
    return None


def _close(pack: Pack, **more: Any) -> None:
    """A pack is over: its trials have results of their own."""
    write_record(pack, is_over=True, **more)
    shutil.rmtree(pack.checkpoints, ignore_errors=True)


def _engine(pack: Pack, starts: Sequence[Start]) -> PackEngine:
    return PackEngine(
        [start.setup for start in starts],
        [start.state for start in starts],
        tokens_at_once=pack.tokens_at_once,
        lanes=pack.lanes,
        mesh=mesh_of(pack.trials[0]),
    )


def _loop(lanes: Sequence[Lane], engine: PackEngine, checkpoints: Checkpoints, step: int) -> Loop:
    return Loop(
        lanes[0].dataset,
        lanes,
        engine,
        step=step,
        save=lambda loop: _save(loop, engine, checkpoints),
        end=lambda loop, lane: _end(loop, engine, lane),
        judge=lambda loop: judge(loop, engine),
    )


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether a fault of the runtime or of Python says that memory ran out."""
    text = str(fault)
    is_told = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    return isinstance(fault, MemoryError) or is_told


def _lane(trial: TrialConfig, start: Start) -> Lane:
    """A trial's lane; one that has ended is computed for its place, and recorded nowhere."""
    directory = trial_dir(trial)
    if is_open(trial):
        return open_lane(trial, directory, start)
    dataset = load_dataset(trial.task, trial.model, trial.train.max_shapes)
    _, _, best, progress, meter = start
    return Lane(trial, directory, start.setup, dataset, _Silent(), best, progress, meter)


class _Silent:
    """The tracker of a lane that has ended."""

    def log(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, summary: dict[str, Any], adapter: Path | None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _save(loop: Loop, engine: PackEngine, checkpoints: Checkpoints) -> None:
    """One checkpoint for all lanes, and a pointer to it in each trial's directory."""
    best = engine.stack_trainables([lane.best for lane in loop.lanes])
    record = {
        trial_id(lane.config): {"index": n, **lane.record()} for n, lane in enumerate(loop.lanes)
    }
    checkpoints.save(loop.step, {"state": engine.host_state(), "best": best}, {"lanes": record})
    for lane in loop.alive():
        if is_open(lane.config):
            point_to(lane.directory, checkpoints.directory)


def _end(loop: Loop, engine: PackEngine, lane: Lane) -> None:
    """Leave in the trial's directory what a trial alone would, unless it is there already.

    The result comes first: a checkpoint of its own tells that a trial went on by itself.
    """
    config, directory, progress = lane.config, lane.directory, lane.progress
    if is_new := is_open(config):
        write_result(lane)
    keeps = config.train.keep_checkpoints and not progress.reason
    if (keeps or progress.cut) and (is_new or not own_steps(directory)):
        state = {"state": engine.state_of(loop.lanes.index(lane)), "best": lane.best}
        with _closing(Checkpoints(directory / CHECKPOINTS)) as own:
            own.save(progress.step, state, lane.record())
    (directory / POINTER).unlink(missing_ok=True)
    if finished_result(directory):
        clean(config, directory)


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[Checkpoints]:
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _measured(engine: PackEngine, loop: Loop, started: float) -> dict[str, Any]:
    costs = engine.costs
    steps = loop.lanes[0].meter.step_seconds
    return {
        "seconds": time.perf_counter() - started,
        "seconds_per_step": float(np.median(steps)) * len(loop.lanes) if steps else None,
        "compile_seconds": sum(cost.compile_seconds for cost in costs),
        "memory_bytes": max((cost.memory_bytes for cost in costs), default=0),
        "peak_rss_bytes": peak_rss(),
    }
