"""Trains one pack: locks, lanes, checkpoints, and what is left when it is over."""

import contextlib
import gc
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax.checkpoint import Checkpoints
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lock import BusyError, locked
from lorax.sweep.engine import PackEngine, mesh_of, trains_alone
from lorax.sweep.halving import judge
from lorax.sweep.pack import (
    Pack,
    is_open,
    is_planned,
    read_record,
    record_plan,
    write_record,
)
from lorax.sweep.standing import Leg, legs_of
from lorax.sweep.words import counted
from lorax.tracking import Silent
from lorax.train.dataset import load_dataset
from lorax.train.lane import Lane
from lorax.train.loop import Loop
from lorax.train.measure import reset_peak_rss
from lorax.train.restore import CHECKPOINTS, POINTER, own_steps, point_to
from lorax.train.results import finished_result, read_result, write_result
from lorax.train.trial import (
    Start,
    clean,
    open_lane,
    progress_bar,
    run_trial,
    writing,
)
from lorax.trial_id import trial_dir

log = logging.getLogger(__name__)
# XLA's own error is at times passed on as a ValueError.
MAY_BE_MEMORY = (jax.errors.JaxRuntimeError, ValueError, MemoryError)


def run_pack(pack: Pack) -> bool:
    """Train the pack's trials that no other process holds; whether there were any.

    A pack on disk that was cut short goes on as it was, with the trials that have ended since
    still in their lanes, so that every number comes out the same to the bit.

    Raises:
      LoraxError: a directory that cannot be written; a single trial that does not fit in memory.
    """
    if trains_alone(pack.trials) and not pack.checkpoints.is_dir():
        return _run_alone(pack)
    with writing(pack.directory), contextlib.ExitStack() as locks:
        if not _take(pack.directory, locks):
            return False
        held = [trial for trial in pack.trials if _take(trial_dir(trial), locks)]
        opened = tuple(trial for trial in held if is_open(trial))
        is_as_it_was = len(held) == len(pack.trials) and _has_begun(pack)
        if opened and (is_as_it_was or len(opened) == len(pack.trials)):
            _train_fitting(pack)
        elif opened:
            _train_instead(pack, [replace(pack, trials=opened)])
    return bool(opened)


def _has_begun(pack: Pack) -> bool:
    record = read_record(pack.directory)
    return record is not None and not is_planned(record)


def _run_alone(pack: Pack) -> bool:
    """A pack of one trial needs no lanes."""
    try:
        result = run_trial(pack.trials[0])
    except BusyError:
        return False
    except MAY_BE_MEMORY as fault:
        if not is_out_of_memory(fault):
            raise
        raise _too_large(pack) from fault
    with writing(pack.directory), contextlib.ExitStack() as locks:
        if _take(pack.directory, locks):
            measured = {name: result[name] for name in ("seconds_per_step", "compile_seconds")}
            measured |= {"seconds": result["seconds_total"], "peak_bytes": _peak_of([result])}
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
    """Train a pack's open trials to their ends, in other packs where they cannot go together."""
    if not any(map(is_open, pack.trials)):
        _close(pack)
        return
    legs = legs_of(pack)
    if [leg.pack for leg in legs] != [pack]:
        _train_instead(pack, [leg.pack for leg in legs])
    elif side := _train(legs[0]):
        gc.collect()
        _train_with_less(pack, side)


def _train_instead(pack: Pack, parts: Sequence[Pack]) -> None:
    """Train a pack's trials in other packs, which begin at its checkpoint."""
    with locked(pack.directory.parent, waits=True):
        record_plan(parts, pack.trials)
    if read_record(pack.directory):
        write_record(pack, is_over=True)
    for part in parts:
        _train_fitting(part)


def _train_with_less(pack: Pack, side: int) -> None:
    """A pack that ran out of memory goes on with less at once, from where it stood."""
    smaller = smaller_packs(pack, side)
    is_split = [part.name for part in smaller] != [pack.name]
    log.warning(
        "pack %s ran out of memory with %s side by side: going on with %s",
        pack.name,
        counted(side, "trial"),
        "packs of half the size" if is_split else f"{smaller[0].lanes} side by side",
    )
    if is_split:
        _train_instead(pack, smaller)
    else:
        _train_fitting(smaller[0])


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


def _train(leg: Leg) -> int | None:
    """Train a leg to its end; or say how many lanes side by side were too many for the memory."""
    pack = leg.pack
    reset_peak_rss()
    if leg.step == 0:
        shutil.rmtree(pack.checkpoints, ignore_errors=True)  # of trials that were deleted since
    engine = None
    with contextlib.ExitStack() as opened:
        lanes = _open_lanes(leg, opened)
        write_record(pack)
        checkpoints = opened.enter_context(contextlib.closing(Checkpoints(pack.checkpoints)))
        _tell_start(leg, lanes[0].total_steps)
        try:
            engine = _engine(pack, leg.starts)
            leg.starts.clear()  # the engine's states are copies
            loop = _loop(lanes, engine, checkpoints, leg.step)
            with progress_bar(leg.trials, loop) as bar:
                loop.run(bar)
        except MAY_BE_MEMORY as fault:
            if not is_out_of_memory(fault):
                raise
            return engine.side if engine else 1
    _close(pack, measured=_measured(pack, engine, loop))
    return None


def _tell_start(leg: Leg, total: int) -> None:
    if leg.step:
        log.info("pack %s goes on from step %d of %d; compiling", leg.pack.name, leg.step, total)
    else:
        shape = f"{counted(len(leg.trials), 'trial')}, {counted(total, 'step')}"
        log.info("pack %s: %s; compiling", leg.pack.name, shape)


def _open_lanes(leg: Leg, opened: contextlib.ExitStack) -> list[Lane]:
    lanes: list[Lane] = []
    for trial, start in zip(leg.trials, leg.starts, strict=True):
        lanes.append(opened.enter_context(_lane(trial, start)))
    since = min(lane.meter.started for lane in lanes)  # when the first was prepared
    for lane in lanes:
        lane.meter.share(len(lanes), since)
    return lanes


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
        judge=lambda loop: _judge(loop, engine),
    )


def _judge(loop: Loop, engine: PackEngine) -> None:
    judge(loop, engine)
    if not sys.stderr.isatty():  # where there is no progress bar
        best = max(loop.lanes, key=lambda lane: lane.standing)
        value = math.nan if best.best_value is None else best.best_value
        words = "step %d of %d: best %s %.4f, %s left"
        left = counted(len(loop.alive()), "trial")
        log.info(words, loop.step, loop.total_steps, best.metric, value, left)


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
    dataset = load_dataset(trial)
    _, _, best, progress, meter = start
    return Lane(trial, directory, start.setup, dataset, Silent(), best, progress, meter)


def _save(loop: Loop, engine: PackEngine, checkpoints: Checkpoints) -> None:
    """One checkpoint for all lanes, and a pointer to it in each trial's directory."""
    best = engine.stack_trainables([lane.best for lane in loop.lanes])
    record = {
        lane.directory.name: {"index": n, **lane.record()} for n, lane in enumerate(loop.lanes)
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
        with contextlib.closing(Checkpoints(directory / CHECKPOINTS)) as own:
            own.save(progress.step, state, lane.record())
    (directory / POINTER).unlink(missing_ok=True)
    if finished_result(directory):
        clean(config, directory)


def _measured(pack: Pack, engine: PackEngine, loop: Loop) -> dict[str, Any]:
    results = [result for trial in pack.trials if (result := read_result(trial_dir(trial)))]
    steps = loop.full_steps
    return {
        "seconds": sum(result["seconds_total"] for result in results),
        "seconds_per_step": float(np.median(steps)) if steps else None,
        "compile_seconds": sum(cost.compile_seconds for cost in engine.costs),
        "peak_bytes": _peak_of(results),
    }


def _peak_of(results: Sequence[dict[str, Any]]) -> int:
    """Most memory that was taken: the device's own account, or else the process's size."""
    return max((r["peak_device_bytes"] or r["peak_rss_bytes"] for r in results), default=0)
