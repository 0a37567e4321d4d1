"""The end of a run: write its adapter and its result, and remove its checkpoints."""

import dataclasses
import shutil
from pathlib import Path

from lorax.lora import count_bytes, unpad
from lorax.runs.adapter import save_adapter
from lorax.runs.content import with_content
from lorax.runs.files import sync_all, write_json
from lorax.runs.results import PRUNED, RESULT, Result, Status
from lorax.runs.trackers import finite
from lorax.runs.trial import POINTER, Trial
from lorax.runtime.provenance import command_line, environment, now
from lorax.train.run import Progress, Run
from lorax.train.setup import HEAD, Setup


def write_result(run: Run) -> Result:
    """Write a run's adapter of its best evaluation, and its result; end its tracker."""
    trial = run.trial
    result = _result(run, _save_adapter(run))
    for path in filter(Path.exists, (trial.adapter, trial.metrics)):
        sync_all(path)  # before the result, which states that these are complete
    write_json(trial.directory / RESULT, result)
    run.tracker.finish(dict(result), trial.adapter)
    return result


def remove_checkpoints(trial: Trial) -> None:
    """Remove the checkpoints that an ended trial no longer needs."""
    (trial.directory / POINTER).unlink(missing_ok=True)
    if not trial.config.train.keep_checkpoints:
        shutil.rmtree(trial.checkpoints, ignore_errors=True)


def start_over(trial: Trial) -> None:
    """Remove a trial's result and checkpoints."""
    for name in (RESULT, POINTER):
        (trial.directory / name).unlink(missing_ok=True)
    shutil.rmtree(trial.checkpoints, ignore_errors=True)


def _save_adapter(run: Run) -> int:
    """Save the trainable part of the best evaluation, at its true rank; return its bytes."""
    trained, spec = run.best, run.setup.spec
    if spec:
        ranks = {target: spec.rank_of(target) for target in trained["lora"]}
        trained = {**trained, "lora": unpad(trained["lora"], ranks)}
    stored = {name: getattr(run.config.train, name) for name in ("precision", "base_dtype")}
    content = run.setup.content
    base = dataclasses.asdict(with_content(run.config, content).model)
    about = {
        "base": base,
        **stored,
        "content": dataclasses.asdict(content),
        "best": run.progress.best,
    }
    return save_adapter(run.trial.adapter, trained, spec, about)


def _result(run: Run, adapter_bytes: int) -> Result:
    progress = run.progress
    result: Result = {
        "trial_id": run.trial.id,
        "status": _status(progress),
        "reason": progress.reason,
        "cut": progress.cut,
        "metric": run.metric,
        "best": progress.best,
        "last": progress.last,
        "steps": progress.step,
        "stopped_early": progress.stopped_early,
        **run.setup.counts,
        **run.meter.summary(),
        "adapter_bytes": adapter_bytes,
        "base_bytes": _base_bytes(run.setup),
        "seed": run.config.seed,
        "content": dataclasses.asdict(run.setup.content),
        "command": command_line(),
        "began": run.meter.began,
        "ended": now(),
        "environment": environment(),
    }
    return finite(result)


def _status(progress: Progress) -> Status:
    if progress.reason:
        return "diverged"
    return PRUNED if progress.cut else "finished"


def _base_bytes(setup: Setup) -> int:
    frozen, trained = setup.frozen.params["base"], setup.trainable["base"]
    rest = {name: part for name, part in trained.items() if name != HEAD}
    return count_bytes(frozen) + count_bytes(rest)
