"""The last lines of a sweep: how its trials ended, the best trials, and the next commands."""

import logging
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorax.config import TrialConfig
from lorax.metric_direction import signed
from lorax.runs.results import PRUNED, Result, sound_result
from lorax.runs.trial import Trial
from lorax.sweep.run_serial import score_of
from lorax.sweep.words import counted

log = logging.getLogger(__name__)
OFFLINE = "*/wandb/offline-run-*"
ENDS = {"finished": "finished", PRUNED: "pruned", "diverged": "diverged", "failed": "failed"}


def log_closing(trials: Sequence[TrialConfig]) -> None:
    """Log the closing lines of a sweep."""
    for line in closing_lines(trials):
        log.info(line)


def closing_lines(trials: Sequence[TrialConfig]) -> list[str]:
    """The counts of a sweep's trials, each task's best trial, and the next commands.

    A trial without a readable result counts as failed.
    """
    unique = list(dict.fromkeys(map(Trial.of, trials)))
    results = {trial: sound_result(trial.directory) for trial in unique}
    counts = Counter(result["status"] if result else "failed" for result in results.values())
    ends = ", ".join(f"{counts[end]} {word}" for end, word in ENDS.items() if counts[end])
    lines = [f"{counted(len(unique), 'trial')}: {ends}"]
    for task in dict.fromkeys(trial.config.task.name for trial in unique):
        own = {t.directory: r for t, r in results.items() if r and t.config.task.name == task}
        lines += _best_line(task, own)
    for folder in dict.fromkeys(trial.sweep_dir for trial in unique):
        lines.append(f"report: python -m experiments.report {shlex.quote(str(folder))}")
        if any(folder.glob(OFFLINE)):
            runs = f"{shlex.quote(str(folder))}/{OFFLINE}"
            lines.append(f"to send the offline runs to W&B: wandb sync {runs}")
    return lines


def _best_line(task: str, results: dict[Path, Result]) -> list[str]:
    scores = {place: score_of(result) for place, result in results.items()}
    scored = {place: score for place, score in scores.items() if not math.isnan(score)}
    if not scored:
        return []
    metrics = {place: results[place]["metric"] for place in scored}
    best = max(scored, key=lambda place: signed(metrics[place], scored[place]))
    return [f"best of {task} by {metrics[best]}, {scored[best]:.4f}: {best}"]
