"""Trains one trial, from its config to `result.json`."""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from tqdm.auto import tqdm

from lorax.config import TrialConfig
from lorax.runs.checkpoints import Checkpoints
from lorax.runs.content import refuse_other_content, with_content
from lorax.runs.files import write_json, writing
from lorax.runs.results import Result, drop_incomplete
from lorax.runs.trackers import catch_up, open_tracker
from lorax.runs.trial import CONFIG, Trial
from lorax.runtime.memory import reset_peak_rss
from lorax.runtime.provenance import code_commit
from lorax.train.dataset import load_dataset
from lorax.train.finish import remove_checkpoints, start_over, write_result
from lorax.train.loop import Loop
from lorax.train.run import Run
from lorax.train.setup import check_trial
from lorax.train.single_engine import SingleEngine
from lorax.train.start import Start, find_start

log = logging.getLogger(__name__)
# The name is last: a long one would move the score out of a terminal of 80 columns.
BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}] {desc}"


def run_trial(config: TrialConfig, *, resume: bool = True) -> Result:
    """Train one trial, resume it, or return its result if it is finished.

    All files are under `<output_dir>/<sweep.name>/<trial id>`: `config.json`, `metrics.jsonl`,
    `checkpoints/`, and at the end `adapter/` (the parameters of the best evaluation) and
    `result.json`; the checkpoints are then removed. A trial that is killed at any moment and
    called again resumes from its last checkpoint and ends with the same numbers.

    Args:
      config: the trial.
      resume: False starts over, whatever is on disk.

    Returns:
      The content of `result.json`: status (`finished` or `diverged`), best and last evaluation,
      parameter counts, costs, environment.

    Raises:
      LoraxError: `check_trial` refuses the trial, before training; its directory cannot be
        written, another process holds it, or the trial was trained there on other content of its
        data or base.
    """
    trial = Trial.of(config)
    if resume:
        refuse_other_content(trial)
        if result := trial.result():
            log.info("%s is finished, skipped", trial.directory)
            catch_up(trial)
            return result
    check_trial(config)
    with writing(trial.directory), trial.held():
        if not resume:
            start_over(trial)
        elif result := trial.result():  # written by another process meanwhile
            return result
        return _train(trial)


def open_run(trial: Trial, start: Start) -> Run:
    """The run of a trial: writes its config and continues its records from the start.

    The written config names the content of the training, even if the trial's own does not.
    """
    code_commit()  # now: the clone may be at another commit when the trial ends
    drop_incomplete(trial.directory)
    named = with_content(trial.config, start.setup.content)
    write_json(trial.directory / CONFIG, dataclasses.asdict(named))
    tracker = open_tracker(trial, named, start.progress.step)
    dataset = load_dataset(trial.config)
    return Run(trial, start.setup, dataset, tracker, start.best, start.progress, start.meter)


def progress_bar(trials: Sequence[Trial], loop: Loop) -> Any:
    """A bar over optimizer steps; silent without a terminal, or if the tracking says so."""
    is_silent = all(trial.config.tracking.kind == "none" for trial in trials)
    name = trials[0].id if len(trials) == 1 else f"pack of {len(trials)} trials"
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


def _train(trial: Trial) -> Result:
    reset_peak_rss()
    start = find_start(trial)
    with contextlib.ExitStack() as opened:
        run = opened.enter_context(open_run(trial, start))
        checkpoints = opened.enter_context(closing(Checkpoints(trial.checkpoints)))
        if step := run.progress.step:
            log.info("%s resumes from step %d of %d", trial.directory, step, run.total_steps)
        engine = SingleEngine(run.setup, start.state)
        del start  # the engine's state is a copy
        return _run_loop(run, engine, checkpoints)


def _run_loop(run: Run, engine: SingleEngine, checkpoints: Checkpoints) -> Result:
    results: list[Result] = []

    def save(loop: Loop) -> None:
        checkpoints.save(loop.step, {"state": engine.state, "best": run.best}, run.record())

    def end(loop: Loop, ended: Run) -> None:
        del loop
        checkpoints.close()
        results.append(write_result(ended))
        remove_checkpoints(ended.trial)

    loop = Loop(run.dataset, [run], engine, step=run.progress.step, save=save, end=end)
    with progress_bar([run.trial], loop) as bar:
        loop.run(bar)
    return results[0]
