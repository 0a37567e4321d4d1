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
from lorax.errors import LoraxError
from lorax.lock import BusyError, locked
from lorax.sweep.engine import PackEngine
from lorax.sweep.halving import judge
from lorax.sweep.pack import Pack, ended_result, read_record, write_record
from lorax.train.lane import Lane, Progress
from lorax.train.loop import Loop
from lorax.train.measure import Meter, peak_rss, reset_peak_rss
from lorax.train.restore import CHECKPOINTS, point_to, read_pack
from lorax.train.results import CUT, write_result
from lorax.train.setup import hyper_of, load_dataset, prepare
from lorax.train.step import init_state
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
        is_known = read_record(pack.directory) is not None
        held = [n for n, trial in enumerate(pack.trials) if _take(trial_dir(trial), locks)]
        opened = [n for n in held if ended_result(pack.trials[n]) is None]
        if not opened:
            return False
        if is_known and len(held) == len(pack.trials):
            _train_fitting(pack)
        else:
            _train_fitting(replace(pack, trials=tuple(pack.trials[n] for n in opened)))
    return True


def _run_alone(pack: Pack) -> bool:
    """A pack of one trial needs no lanes."""
    try:
        result = run_trial(pack.trials[0])
    except BusyError:
        return False
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
    """Train a pack; one that runs out of memory goes on in smaller ones, from where it stood."""
    side = _out_of_memory_side(pack)
    if side is None:
        return
    gc.collect()
    smaller = smaller_packs(pack, side)
    write_record(pack, is_over=True)
    log.warning(
        "pack %s ran out of memory with %d trials side by side: going on with %s",
        pack.name,
        side,
        f"{smaller[0].lanes} side by side" if len(smaller) == 1 else "two packs of half the size",
    )
    for part in smaller:
        _train_fitting(part)
    shutil.rmtree(pack.checkpoints, ignore_errors=True)


def smaller_packs(pack: Pack, side: int) -> list[Pack]:
    """What a pack is split into that ran out of memory with `side` lanes side by side.

    Raises:
      LoraxError: a single trial.
    """
    if side > 1:
        return [replace(pack, lanes=side // 2)]
    if len(pack.trials) == 1:
        raise LoraxError(
            f"trial {pack.ids[0]} does not fit in memory even alone; lower train.batch_size, "
            "raise train.grad_accum or lower task.max_length"
        )
    half = (len(pack.trials) + 1) // 2
    parts = pack.trials[:half], pack.trials[half:]
    return [replace(pack, trials=part, lanes=1) for part in parts]


def _out_of_memory_side(pack: Pack) -> int | None:
    """None when the pack is over; else how many lanes side by side were too many."""
    members, starts = _starts(pack)
    steps = sorted({start.progress.step for start in starts if start is not None})
    if len(steps) == 1:
        return _train(pack, members, starts, steps[0])
    for step in steps:  # trials that come from different places go on in packs of their own
        chosen = [s is not None and s.progress.step == step for s in starts]
        trials = tuple(t for t, is_chosen in zip(members, chosen, strict=True) if is_chosen)
        part = replace(pack, trials=trials)
        own = [s for s, is_chosen in zip(starts, chosen, strict=True) if is_chosen]
        side = _train(part, trials, own, step)
        if side is not None:
            for smaller in smaller_packs(part, side):
                _train_fitting(smaller)
    return None


def _starts(pack: Pack) -> tuple[tuple[Any, ...], list[Start | None]]:
    """(trials of the lanes, where each goes on from; None for one that has ended)."""
    packs: dict[Path, Any] = {}
    members, step = pack.trials, 0
    if pack.checkpoints.is_dir():
        packs[pack.checkpoints.absolute()] = found = read_pack(pack.checkpoints)
        if found:  # a pack may have shrunk since it began
            place = {name: lane["index"] for name, lane in found[1]["lanes"].items()}
            kept = [trial for trial in members if trial_id(trial) in place]
            members = tuple(sorted(kept, key=lambda trial: place[trial_id(trial)]))
            step = max(lane["progress"]["step"] for lane in found[1]["lanes"].values())
    return members, [_start(trial, step, packs) for trial in members]


def _start(trial: Any, step: int, packs: dict[Path, Any]) -> Start | None:
    directory, result = trial_dir(trial), ended_result(trial)
    if result and not (result["status"] == CUT and result["steps"] > step):
        return None
    if result:  # cut after the checkpoint that its pack goes on from: it will be cut again
        (directory / "result.json").unlink()
    return find_start(trial, directory, packs)


def _train(
    pack: Pack, members: Sequence[Any], starts: Sequence[Start | None], step: int
) -> int | None:
    reset_peak_rss()
    lanes, states = _lanes(members, starts)
    engine = PackEngine(
        [lane.setup for lane in lanes],
        states,
        tokens_at_once=pack.tokens_at_once,
        lanes=pack.lanes,
    )
    write_record(pack)
    checkpoints = Checkpoints(pack.checkpoints)
    if step:
        log.info("pack %s goes on from step %d of %d", pack.name, step, lanes[0].total_steps)
    loop = Loop(
        lanes[0].dataset,
        lanes,
        engine,
        step=step,
        save=lambda loop: _save(loop, engine, checkpoints),
        end=lambda loop, lane: _end(loop, engine, lane),
        judge=lambda loop: judge(loop, engine),
    )
    started = time.perf_counter()
    try:
        with progress_bar(members, loop) as bar:
            loop.run(bar)
    except (jax.errors.JaxRuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        return engine.side
    finally:
        checkpoints.close()
        for lane in lanes:
            if not lane.has_ended:
                lane.tracker.close()
    write_record(pack, is_over=True, measured=_measured(engine, loop, started))
    shutil.rmtree(pack.checkpoints, ignore_errors=True)
    return None


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether a fault of the runtime or of Python says that memory ran out."""
    return isinstance(fault, MemoryError) or "RESOURCE_EXHAUSTED" in str(fault)


def _lanes(members: Sequence[Any], starts: Sequence[Start | None]) -> tuple[list[Lane], list[Any]]:
    lanes, states = [], []
    for trial, start in zip(members, starts, strict=True):
        if start is None:
            lane, state = _ghost(trial)
        else:
            lane, state = open_lane(trial, trial_dir(trial), start), start.state
        lane.meter.share(len(members))
        lanes.append(lane)
        states.append(state)
    return lanes, states


def _ghost(trial: Any) -> tuple[Lane, Any]:
    """A lane whose trial has ended: computed for its place in the program, and recorded nowhere."""
    setup = prepare(trial)
    state = init_state(setup.trainable, hyper_of(trial), setup.dropout_key)
    result = ended_result(trial)
    assert result is not None
    names = ("best", "last", "reason", "stopped_early", "cut")
    progress = Progress(result["steps"], **{name: result[name] for name in names})
    best = jax.tree.map(np.asarray, state.trainable)
    dataset = load_dataset(trial.task, trial.model, trial.train.max_shapes)
    lane = Lane(trial, trial_dir(trial), setup, dataset, _Silent(), best, progress, Meter())
    lane.has_ended = True
    return lane, state


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
    checkpoints.save(loop.step, {"state": engine.state, "best": best}, {"lanes": record})
    for lane in loop.alive():
        point_to(lane.directory, checkpoints.directory)


def _end(loop: Loop, engine: PackEngine, lane: Lane) -> None:
    """Leave in the trial's directory what a trial alone would."""
    keeps = lane.config.train.keep_checkpoints and not lane.progress.reason
    if keeps or lane.progress.cut:
        state = {"state": engine.state_of(loop.lanes.index(lane)), "best": lane.best}
        with _closing(Checkpoints(lane.directory / CHECKPOINTS)) as own:
            own.save(lane.progress.step, state, lane.record())
    write_result(lane)
    if not lane.progress.cut:
        clean(lane.config, lane.directory)


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
