"""Trains one pack: locks, runs, checkpoints, and the files that it leaves."""

import contextlib
import gc
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lorax.errors import LoraxError
from lorax.runs.checkpoints import Checkpoints
from lorax.runs.files import writing
from lorax.runs.lock import BusyError, locked
from lorax.runs.pack_dir import PackRecord, read_record, write_record
from lorax.runs.restore import point_to
from lorax.runs.results import PRUNED, Result, read_result
from lorax.runs.trackers import Silent
from lorax.runs.trial import POINTER, Trial
from lorax.runtime.memory import reset_peak_rss
from lorax.sweep.halving import judge
from lorax.sweep.pack import Pack, record_plan
from lorax.sweep.resume import Resumption, resumptions_of
from lorax.sweep.words import counted
from lorax.train.batched_engine import BatchedEngine, mesh_of, trains_alone
from lorax.train.dataset import load_dataset
from lorax.train.finish import remove_checkpoints, write_result
from lorax.train.loop import Loop
from lorax.train.run import Run
from lorax.train.run_trial import open_run, progress_bar, run_trial
from lorax.train.start import Start

log = logging.getLogger(__name__)
# XLA's own error is at times passed on as a ValueError.
MAY_BE_MEMORY = (jax.errors.JaxRuntimeError, ValueError, MemoryError)


def run_pack(pack: Pack) -> bool:
    """Train the pack's trials that no other process holds; return whether there were any.

    A killed pack resumes unchanged: trials that have ended keep their lanes, so that every number
    is bit-identical.

    Raises:
      LoraxError: a directory that cannot be written; a single trial that does not fit in memory.
    """
    if trains_alone([t.config for t in pack.trials]) and not pack.checkpoints.is_dir():
        return _run_alone(pack)
    with writing(pack.directory), contextlib.ExitStack() as locks:
        if not _take_pack(pack, locks):
            return False
        held = [trial for trial in pack.trials if _take(trial, locks)]
        opened = tuple(trial for trial in held if trial.is_open)
        if opened:
            is_whole = len(opened) == len(pack.trials)
            resumes = len(held) == len(pack.trials) and pack.has_begun
            own = replace(pack, trials=opened)
            _train_all([pack] if is_whole or resumes else _replaced(pack, [own]))
    return bool(opened)


def _run_alone(pack: Pack) -> bool:
    """Train a pack of a single trial, which needs no lanes."""
    try:
        result = run_trial(pack.trials[0].config)
    except BusyError:
        return False
    except MAY_BE_MEMORY as fault:
        if not is_out_of_memory(fault):
            raise
        raise _too_large(pack) from fault
    with writing(pack.directory), contextlib.ExitStack() as locks:
        if _take_pack(pack, locks):
            measured = {
                "seconds_per_step": result["seconds_per_step"],
                "compile_seconds": result["compile_seconds"],
                "seconds": result["seconds_total"],
                "peak_bytes": _peak_of([result]),
            }
            write_record(pack.directory, {**pack.record, "is_over": True, "measured": measured})
    return True


def _take_pack(pack: Pack, locks: contextlib.ExitStack) -> bool:
    pack.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BusyError):
        locks.enter_context(locked(pack.directory))
        return True
    return False


def _take(trial: Trial, locks: contextlib.ExitStack) -> bool:
    with contextlib.suppress(BusyError):
        locks.enter_context(trial.held())
        return True
    return False


def _train_all(packs: Sequence[Pack]) -> None:
    """Train packs to their ends; other packs replace one that cannot train unchanged."""
    waiting = list(packs)
    while waiting:
        pack = waiting.pop(0)
        if not pack.open_trials():
            _close(pack)
            continue
        resumptions = resumptions_of(pack)
        if [resumption.pack for resumption in resumptions] != [pack]:
            waiting = _replaced(pack, [resumption.pack for resumption in resumptions]) + waiting
        elif side := _train(resumptions[0]):
            gc.collect()
            waiting = _with_less(pack, side) + waiting


def _replaced(pack: Pack, parts: list[Pack]) -> list[Pack]:
    """Record that a pack's trials train in other packs, which start from its checkpoint."""
    with locked(pack.directory.parent, waits=True):
        record_plan(parts, pack.trials)
    if read_record(pack.directory):
        write_record(pack.directory, {**pack.record, "is_over": True})
    return parts


def _with_less(pack: Pack, side: int) -> list[Pack]:
    """The packs that replace one out of memory; they resume from its newest checkpoint."""
    smaller = smaller_packs(pack, side)
    is_split = [part.name for part in smaller] != [pack.name]
    log.warning(
        "pack %s ran out of memory with %s side by side: continuing with %s",
        pack.name,
        counted(side, "trial"),
        "packs of half the size" if is_split else f"{smaller[0].lanes} side by side",
    )
    return _replaced(pack, smaller) if is_split else smaller


def smaller_packs(pack: Pack, side: int) -> list[Pack]:
    """The packs that replace one that ran out of memory with `side` lanes side by side.

    Raises:
      LoraxError: the pack has a single trial.
    """
    if side > 1:
        return [replace(pack, lanes=side // 2)]
    if len(pack.trials) == 1:
        raise _too_large(pack)
    opened = pack.open_trials()
    half = (len(opened) + 1) // 2
    parts = opened[:half], opened[half:]
    return [replace(pack, trials=part, lanes=1) for part in parts if part]


def _too_large(pack: Pack) -> LoraxError:
    return LoraxError(
        f"trial {pack.ids[0]} does not fit in memory even alone; lower train.batch_size, "
        "raise train.grad_accum or lower task.max_length"
    )


def _train(resumption: Resumption) -> int | None:
    """Train to the end, or return the number of lanes side by side that did not fit in memory."""
    pack = resumption.pack
    reset_peak_rss()
    if resumption.step == 0:
        shutil.rmtree(pack.checkpoints, ignore_errors=True)  # of trials deleted since
    engine = None
    with contextlib.ExitStack() as opened:
        runs = _open_runs(resumption, opened)
        write_record(pack.directory, pack.record)
        checkpoints = opened.enter_context(closing(Checkpoints(pack.checkpoints)))
        _log_start(resumption, runs[0].total_steps)
        try:
            engine = _engine(pack, resumption.starts)
            resumption.starts.clear()  # the engine's states are copies
            loop = _loop(runs, engine, checkpoints, resumption.step)
            with progress_bar(resumption.trials, loop) as bar:
                loop.run(bar)
        except MAY_BE_MEMORY as fault:
            if not is_out_of_memory(fault):
                raise
            return engine.side if engine else 1
    _close(pack, _measured(pack, engine, loop))
    return None


def _log_start(resumption: Resumption, total: int) -> None:
    name, step = resumption.pack.name, resumption.step
    if step:
        log.info("pack %s resumes from step %d of %d; compiling", name, step, total)
    else:
        shape = f"{counted(len(resumption.trials), 'trial')}, {counted(total, 'step')}"
        log.info("pack %s: %s; compiling", name, shape)


def _open_runs(resumption: Resumption, opened: contextlib.ExitStack) -> list[Run]:
    pairs = zip(resumption.trials, resumption.starts, strict=True)
    runs = [opened.enter_context(_run_of(trial, start)) for trial, start in pairs]
    since = min(run.meter.started for run in runs)  # the first one's preparation
    for run in runs:
        run.meter.share(len(runs), since)
    return runs


def _run_of(trial: Trial, start: Start) -> Run:
    """A trial's run; the lane of an ended trial is computed but not recorded."""
    if trial.is_open:
        return open_run(trial, start)
    dataset = load_dataset(trial.config)
    return Run(trial, start.setup, dataset, Silent(), start.best, start.progress, start.meter)


def _close(pack: Pack, measured: dict[str, Any] | None = None) -> None:
    """Record that a pack is over: its trials have results of their own."""
    record: PackRecord = {**pack.record, "is_over": True}
    if measured:
        record["measured"] = measured
    write_record(pack.directory, record)
    shutil.rmtree(pack.checkpoints, ignore_errors=True)


def _engine(pack: Pack, starts: Sequence[Start]) -> BatchedEngine:
    return BatchedEngine(
        [start.setup for start in starts],
        [start.state for start in starts],
        tokens_at_once=pack.tokens_at_once,
        lanes=pack.lanes,
        mesh=mesh_of(pack.trials[0].config),
    )


def _loop(runs: Sequence[Run], engine: BatchedEngine, checkpoints: Checkpoints, step: int) -> Loop:
    return Loop(
        runs[0].dataset,
        runs,
        engine,
        step=step,
        save=lambda loop: _save(loop, engine, checkpoints),
        end=lambda loop, run: _end(loop, engine, run),
        judge=lambda loop: _judge(loop, engine),
    )


def _judge(loop: Loop, engine: BatchedEngine) -> None:
    judge(loop, engine)
    if not sys.stderr.isatty():  # there is no progress bar
        best = max(loop.runs, key=lambda run: run.signed_best)
        value = math.nan if best.best_value is None else best.best_value
        words = "step %d of %d: best %s %.4f, %s left"
        left = counted(len(loop.alive()), "trial")
        log.info(words, loop.step, loop.total_steps, best.metric, value, left)


def _save(loop: Loop, engine: BatchedEngine, checkpoints: Checkpoints) -> None:
    """Write one checkpoint for all lanes, and a pointer to it in each trial's directory."""
    best = engine.stack_trainables([run.best for run in loop.runs])
    record = {run.trial.id: {"index": n, **run.record()} for n, run in enumerate(loop.runs)}
    checkpoints.save(loop.step, {"state": engine.host_state(), "best": best}, {"lanes": record})
    for run in loop.alive():
        if run.trial.is_open:
            point_to(run.trial, checkpoints.directory)


def _end(loop: Loop, engine: BatchedEngine, run: Run) -> None:
    """Write the files of a trial that has trained alone, unless they exist already.

    The result is written first: a checkpoint of its own means that a trial continued alone.
    """
    trial, progress = run.trial, run.progress
    if is_new := trial.is_open:
        write_result(run)
    keeps = trial.config.train.keep_checkpoints and not progress.reason
    if (keeps or progress.cut) and (is_new or not trial.own_steps()):
        state = {"state": engine.state_of(loop.runs.index(run)), "best": run.best}
        with closing(Checkpoints(trial.checkpoints)) as own:
            own.save(progress.step, state, run.record())
    (trial.directory / POINTER).unlink(missing_ok=True)
    result = read_result(trial.directory)
    if result and result["status"] != PRUNED:
        remove_checkpoints(trial)


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether a fault of the runtime or of Python reports that memory ran out."""
    text = str(fault)
    is_told = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    return isinstance(fault, MemoryError) or is_told


def _measured(pack: Pack, engine: BatchedEngine, loop: Loop) -> dict[str, Any]:
    results = [result for t in pack.trials if (result := read_result(t.directory))]
    steps = loop.full_steps
    return {
        "seconds": sum(result["seconds_total"] for result in results),
        "seconds_per_step": float(np.median(steps)) if steps else None,
        "compile_seconds": sum(cost.compile_seconds for cost in engine.costs),
        "peak_bytes": _peak_of(results),
    }


def _peak_of(results: Sequence[Result]) -> int:
    """Peak memory in bytes: as the device reports it, or else of the process."""
    return max((r["peak_device_bytes"] or r["peak_rss_bytes"] for r in results), default=0)
