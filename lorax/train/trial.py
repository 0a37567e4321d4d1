"""One trial, from its config to `result.json`."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from lorax.checkpoint import Checkpoints, save_adapter, write_json
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lock import locked
from lorax.lora import count_bytes, unpad
from lorax.tracking import finite, open_tracker
from lorax.train.loop import Loop, Progress
from lorax.train.measure import Meter, environment, reset_peak_rss
from lorax.train.results import read_result
from lorax.train.setup import Setup, check_trial, hyper_of, load_dataset, prepare
from lorax.train.step import State, init_state
from lorax.trial_id import trial_dir, trial_id

log = logging.getLogger(__name__)
Result = dict[str, Any]


def run_trial(config: TrialConfig, *, resume: bool = True) -> Result:
    """Train one trial, or go on with it, or return its result when it is finished.

    Everything is written under `<output_dir>/<sweep>/<trial id>`: `config.json`,
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
        written, or in which another process runs this trial.
    """
    directory = trial_dir(config)
    if resume and (result := read_result(directory)):
        log.info("%s is finished, skipped", directory)
        return result
    check_trial(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            if not resume:
                _forget(directory)
            write_json(directory / "config.json", dataclasses.asdict(config))
            return _train(config, directory)
    except OSError as fault:
        place = fault.filename or directory
        raise LoraxError(f"cannot write {place}: {fault.strerror or fault}") from fault


def _forget(directory: Path) -> None:
    (directory / "result.json").unlink(missing_ok=True)
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _train(config: TrialConfig, directory: Path) -> Result:
    reset_peak_rss()
    dataset = load_dataset(config.task, config.model, config.train.max_shapes)
    setup = prepare(config)
    checkpoints = Checkpoints(directory / "checkpoints")
    state = init_state(setup.trainable, hyper_of(config), setup.dropout_key)
    state, best, progress, meter = _restore(checkpoints, state)
    trial = {**dataclasses.asdict(config), "trial_id": trial_id(config)}
    tracker = open_tracker(config.tracking, directory, trial, progress.step)
    loop = Loop(config, dataset, setup, checkpoints, tracker, state, best, progress, meter)
    if progress.step:
        log.info("%s goes on from step %d of %d", directory, progress.step, loop.total_steps)
    with _bar(config, loop) as bar:
        loop.run(bar)
    checkpoints.close()
    adapter = directory / "adapter"
    adapter_bytes = _save_adapter(adapter, config, setup, loop.best, progress)
    result = _result(config, loop, adapter_bytes)
    write_json(directory / "result.json", result)
    if not config.train.keep_checkpoints:
        shutil.rmtree(checkpoints.directory, ignore_errors=True)
    tracker.finish(result, adapter)
    return result


def _restore(checkpoints: Checkpoints, state: State) -> tuple[State, Any, Progress, Meter]:
    initial = jax.tree.map(np.asarray, state.trainable)
    found = checkpoints.restore({"state": state, "best": initial})
    if found is None:
        return _own(state), initial, Progress(), Meter()
    arrays, record = found
    best = jax.tree.map(np.asarray, arrays["best"])
    progress, meter = Progress(**record["progress"]), Meter.restore(record["costs"])
    return arrays["state"], best, progress, meter


def _own(state: State) -> State:
    """Copies: the step donates its state, and the frozen side may share arrays with it."""
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)


def _bar(config: TrialConfig, loop: Loop) -> Any:
    silent = (
        True if config.tracking.kind == "none" else None
    )  # None: silent where there is no terminal
    return tqdm(
        total=loop.total_steps,
        initial=loop.progress.step,
        desc=trial_id(config),
        unit="step",
        leave=False,
        disable=silent,
        mininterval=0.5,
    )


def _save_adapter(
    path: Path, config: TrialConfig, setup: Setup, best: Any, progress: Progress
) -> int:
    """Keep the best evaluation's trained part, at its true rank."""
    trained = best
    if setup.spec:
        ranks = {target: setup.spec.rank_of(target) for target in best["lora"]}
        trained = {**best, "lora": unpad(best["lora"], ranks)}
    about = {"base": dataclasses.asdict(config.model), "best": progress.best}
    return save_adapter(path, trained, setup.spec, about)


def _result(config: TrialConfig, loop: Loop, adapter_bytes: int) -> Result:
    progress, setup = loop.progress, loop.setup
    result = {
        "trial_id": trial_id(config),
        "status": "diverged" if progress.reason else "finished",
        "reason": progress.reason,
        "metric": loop.dataset.task.metrics[0],
        "best": progress.best,
        "last": progress.last,
        "steps": progress.step,
        "stopped_early": progress.stopped_early,
        **setup.counts,
        **loop.meter.summary(),
        "adapter_bytes": adapter_bytes,
        "base_bytes": _base_bytes(setup),
        "environment": environment(),
    }
    return finite(result)


def _base_bytes(setup: Setup) -> int:
    frozen, trained = setup.frozen.params["base"], setup.trainable["base"]
    return count_bytes(frozen) + count_bytes(trained.get("encoder", {}))
