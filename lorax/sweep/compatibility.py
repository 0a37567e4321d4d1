"""Groups of trials that can share a program: those that differ in data only."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from lorax.config import TrialConfig
from lorax.effective import effective
from lorax.runs.trial_id import trial_id

FREE = frozenset({"pad_rank", "early_stopping", "log_every", "keep_checkpoints"})
Settings = dict[str, Any]


def program_settings(trial: TrialConfig) -> Settings:
    """The settings that all trials of a pack share: task, model, steps, batches, variant, place.

    Rank, alpha, scale law, targets, initialiser, the whole optimizer, its schedule and the seed
    are data and may differ.
    """
    settings: Settings = {"output_dir": trial.output_dir, "sweep.name": trial.sweep.name}
    settings |= effective(
        {
            f"{part}.{name}": value
            for part in ("task", "model", "train")
            for name, value in dataclasses.asdict(getattr(trial, part)).items()
            if name not in FREE
        }
    )
    if trial.train.mode == "lora":
        settings["lora.dropout"] = float(trial.lora.dropout)
    if trial.train.mode == "full":  # nothing is frozen, so there is nothing to share
        settings["trial"] = trial_id(trial)
    return settings


def group_trials(trials: Sequence[TrialConfig]) -> list[list[int]]:
    """Indices of the trials that can share a program, in order of their first trial.

    >>> from lorax.config import TaskConfig
    >>> cola, mrpc = TaskConfig("cola"), TaskConfig("mrpc")
    >>> group_trials([TrialConfig(cola), TrialConfig(mrpc), TrialConfig(cola, seed=1)])
    [[0, 2], [1]]
    """
    groups: dict[str, list[int]] = {}
    for n, trial in enumerate(trials):
        key = json.dumps(program_settings(trial), sort_keys=True)
        groups.setdefault(key, []).append(n)
    return list(groups.values())


def group_for_jobs(trials: Sequence[TrialConfig]) -> list[list[int]]:
    """As `group_trials`, in parts of at most `sweep.max_trials`, one part for each cluster job.

    It needs neither weights nor devices, so it can run on a login node. Each job plans its part
    on its own device.
    """
    return [
        part
        for group in group_trials(trials)
        for part in even_parts(group, min(trials[n].sweep.max_trials for n in group))
    ]


def even_parts(items: Sequence[int], most: int) -> list[list[int]]:
    """Items split into the fewest parts of at most `most` items, of similar sizes.

    >>> even_parts(range(7), 3)
    [[0, 1, 2], [3, 4], [5, 6]]
    """
    count = math.ceil(len(items) / most)
    sizes = [len(items) // count + (n < len(items) % count) for n in range(count)]
    ends = [sum(sizes[: n + 1]) for n in range(count)]
    return [list(items[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def why_apart(trials: Sequence[TrialConfig]) -> str:
    """The settings in which trials of several programs differ; empty for one program.

    >>> why_apart([TrialConfig(), TrialConfig(seed=1)])
    ''
    """
    all_settings = [program_settings(trial) for trial in trials]
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    reasons = []
    for name in names:
        there = [settings[name] for settings in all_settings if name in settings]
        values = list(dict.fromkeys(map(json.dumps, there)))
        if name == "trial" and len(all_settings) > 1:
            reasons.append("full fine-tuning freezes nothing to share")
        elif len(values) > 1:
            reasons.append(f"{name} ({', '.join(value.strip(chr(34)) for value in values[:6])})")
    return "; ".join(reasons)
