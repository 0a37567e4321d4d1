"""One trial, from its config to `result.json`."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from lorax.checkpoint import Checkpoints, write_json
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lock import BusyError, locked
from lorax.tracking import catch_up, is_behind, open_tracker
from lorax.train.content import check_record, refuse_other_content, with_content
from lorax.train.dataset import load_dataset
from lorax.train.engine import Solo
from lorax.train.lane import Lane, Progress
from lorax.train.loop import Loop
from lorax.train.measure import Meter, reset_peak_rss
from lorax.train.provenance import code_commit
from lorax.train.restore import CHECKPOINTS, POINTER, RESULT, restore
from lorax.train.results import (
    Result,
    drop_incomplete,
    finished_result,
    read_result,
    write_result,
)
from lorax.train.setup import Setup, check_trial, hyper_of, prepare
from lorax.train.step import State, init_state
from lorax.trial_id import trial_dir

log = logging.getLogger(__name__)
# The name comes last: a long one would push the score out of a terminal of 80 columns.
BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}] {desc}"


def run_trial(config: TrialConfig, *, resume: bool = True) -> Result:
    """Train one trial, or go on with it, or return its result when it is finished.

    Everything is written under `<output_dir>/<sweep.name>/<trial id>`: `config.json`,
    `metrics.jsonl`, `checkpoints/`, and at the end `adapter/` (what was trained, as the best
    evaluation saw it) and `result.json`, which make the checkpoints superfluous. Killed at any
    moment and called again, a trial goes on from its last checkpoint and ends with the same
    numbers.

    Args:
      config: the trial.
      resume: False starts over, whatever is on disk.

    Returns:
      The contents of `result.json`: status (`finished` or `diverged`), best and last
      evaluation, parameter counts, costs, environment.

    Raises:
      LoraxError: whatever `check_trial` refuses, before training; a directory that cannot be
        written, in which another process runs this trial, or in which it was trained on another
        content of its data or base.
    """
    directory = trial_dir(config)
    if resume:
        refuse_other_content(config, directory)
    if resume and (result := finished_result(directory)):
        log.info("%s is finished, skipped", directory)
        track_end(config)
        return result
    check_trial(config)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            if resume and (result := finished_result(directory)):  # by another process, just now
                return result
            if not resume:
                _forget(directory)
            return _train(config, directory)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """A file or disk that cannot be written, as a LoraxError that names it."""
    try:
        yield
    except OSError as fault:
        place = fault.filename or directory
        raise LoraxError(f"cannot write {place}: {fault.strerror or fault}") from fault


class Start(NamedTuple):
    """Where a trial goes on from: `state` and `best` are arrays in its own shapes."""

    setup: Setup
    state: State
    best: Any
    progress: Progress
    meter: Meter


def find_start(config: TrialConfig, directory: Path, packs: dict[Path, Any] | None = None) -> Start:
    """Where a trial stands: at its newest checkpoint, or at its beginning.

    Args:
      config: the trial, checked.
      directory: its own, locked by this process.
      packs: see `restore`.

    Raises:
      LoraxError: the checkpoint is of another content of the trial's data or base.
    """
    setup = prepare(config)
    state = init_state(setup.trainable, hyper_of(config), setup.dropout_key)
    best = jax.tree.map(np.asarray, state.trainable)
    progress, meter = Progress(), Meter()
    if found := restore(directory, {"state": state, "best": best}, packs):
        arrays, record = found
        check_record(config, directory, record, setup.content)
        state, best = arrays["state"], jax.tree.map(np.asarray, arrays["best"])
        progress, meter = Progress(**record["progress"]), Meter.restore(record["costs"])
        progress.cut = None  # who opens a trial that was cut wants it to go on
    return Start(setup, state, best, progress, meter)


def open_lane(config: TrialConfig, directory: Path, start: Start) -> Lane:
    """The trial's side of the loop; its config is written, its records go on from its start.

    The config names the content that it is trained on, even where the trial's own does not.
    """
    dataset = load_dataset(config)
    code_commit()  # as it is now: later the clone may be at another one
    drop_incomplete(directory)
    named = with_content(config, start.setup.content)
    write_json(directory / "config.json", dataclasses.asdict(named))
    step = start.progress.step
    tracker = open_tracker(config.tracking, directory, _described(named, directory), step)
    return Lane(
        config, directory, start.setup, dataset, tracker, start.best, start.progress, start.meter
    )


def _described(config: TrialConfig, directory: Path) -> dict[str, Any]:
    """The config as trackers get it."""
    return {**dataclasses.asdict(config), "trial_id": directory.name}


def track_end(config: TrialConfig) -> None:
    """Send a tracker what it has missed of a trial that has ended, if anything."""
    directory = trial_dir(config)
    if not is_behind(config.tracking, directory):
        return
    with contextlib.suppress(BusyError), locked(directory):
        if result := read_result(directory):
            catch_up(config.tracking, directory, _described(config, directory), result)


def clean(config: TrialConfig, directory: Path) -> None:
    """Remove what a trial that has ended no longer needs."""
    (directory / POINTER).unlink(missing_ok=True)
    if not config.train.keep_checkpoints:
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def _forget(directory: Path) -> None:
    for name in (RESULT, POINTER):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def _train(config: TrialConfig, directory: Path) -> Result:
    reset_peak_rss()
    start = find_start(config, directory)
    with contextlib.ExitStack() as opened:
        lane = opened.enter_context(open_lane(config, directory, start))
        checkpoints = opened.enter_context(closing(Checkpoints(directory / CHECKPOINTS)))
        if step := lane.progress.step:
            log.info("%s goes on from step %d of %d", directory, step, lane.total_steps)
        engine = Solo(lane.setup, start.state)
        del start  # the engine's state is a copy
        return _run(lane, engine, checkpoints)


def _run(lane: Lane, engine: Solo, checkpoints: Checkpoints) -> Result:
    config, directory = lane.config, lane.directory
    results: list[Result] = []

    def save(loop: Loop) -> None:
        checkpoints.save(loop.step, {"state": engine.state, "best": lane.best}, lane.record())

    def end(loop: Loop, ended: Lane) -> None:
        del loop
        checkpoints.close()
        results.append(write_result(ended))
        clean(config, directory)

    loop = Loop(lane.dataset, [lane], engine, step=lane.progress.step, save=save, end=end)
    with progress_bar([config], loop) as bar:
        loop.run(bar)
    return results[0]


def progress_bar(trials: Sequence[TrialConfig], loop: Loop) -> Any:
    """A bar over optimizer steps; silent without a terminal or when tracking asks for silence."""
    is_silent = all(trial.tracking.kind == "none" for trial in trials)
    name = trial_dir(trials[0]).name if len(trials) == 1 else f"pack of {len(trials)} trials"
    return tqdm(
        total=loop.total_steps,
        initial=loop.step,
        desc=name,
        postfix="compiling",  # until the first step has ended
        bar_format=BAR,
        unit="step",
        leave=False,
        disable=True if is_silent else None,  # None: silent where there is no terminal
        mininterval=0.5,
    )
