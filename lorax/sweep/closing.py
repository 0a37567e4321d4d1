"""The last lines of a sweep: how its trials ended, the best of them, and what to do next."""

import logging
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax.config import TrialConfig
from lorax.goodness import goodness
from lorax.sweep.serial import score_of
from lorax.sweep.words import counted
from lorax.train.results import sound_result
from lorax.trial_id import sweep_dir, trial_dir

log = logging.getLogger(__name__)
OFFLINE = "*/wandb/offline-run-*"
ENDS = ("finished", "cut", "diverged", "failed")


def log_closing(trials: Sequence[TrialConfig]) -> None:
    """Log the closing lines of a sweep."""
    for line in closing_lines(trials):
        log.info(line)


def closing_lines(trials: Sequence[TrialConfig]) -> list[str]:
    """The counts of a sweep's trials, each task's best trial, and commands for what comes next.

    A trial without a readable result counts as failed.
    """
    unique = {trial_dir(trial): trial for trial in trials}
    results = {place: sound_result(place) for place in unique}
    counts = Counter(result["status"] if result else "failed" for result in results.values())
    ends = ", ".join(f"{counts[end]} {end}" for end in ENDS if counts[end])
    lines = [f"{counted(len(unique), 'trial')}: {ends}"]
    for task in dict.fromkeys(trial.task.name for trial in unique.values()):
        own = {p: r for p, r in results.items() if r and unique[p].task.name == task}
        lines += _best_line(task, own)
    folders = dict.fromkeys(map(sweep_dir, unique.values()))
    for folder in folders:
        lines.append(f"report: python -m experiments.report {shlex.quote(str(folder))}")
        if any(folder.glob(OFFLINE)):
            runs = f"{shlex.quote(str(folder))}/{OFFLINE}"
            lines.append(f"to send the offline runs to W&B: wandb sync {runs}")
    return lines


def _best_line(task: str, results: dict[Path, dict[str, Any]]) -> list[str]:
    scores = {place: score_of(result) for place, result in results.items()}
    scored = {place: score for place, score in scores.items() if not math.isnan(score)}
    if not scored:
        return []
    metrics = {place: results[place]["metric"] for place in scored}
    best = max(scored, key=lambda place: goodness(metrics[place], scored[place]))
    return [f"best of {task} by {metrics[best]}, {scored[best]:.4f}: {best}"]
