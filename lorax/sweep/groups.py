"""Which trials can share a program: those that differ in data alone."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from lorax.config import TrialConfig
from lorax.trial_id import trial_id

FREE = frozenset({"pad_rank", "early_stopping", "log_every", "keep_checkpoints"})
Settings = dict[str, Any]


def program_settings(trial: TrialConfig) -> Settings:
    """What the trials of a pack have in common: task, model, steps, batches, variant, place.

    Rank, alpha, scale law, targets, initialiser, the whole optimizer, its schedule and the seed
    are data, and not among them.
    """
    settings: Settings = {"output_dir": trial.output_dir, "sweep.name": trial.sweep.name}
    settings |= {
        f"{part}.{name}": value
        for part in ("task", "model", "train")
        for name, value in dataclasses.asdict(getattr(trial, part)).items()
        if name not in FREE
    }
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


def why_apart(trials: Sequence[TrialConfig]) -> str:
    """In which settings trials of several programs differ; empty for one program.

    >>> why_apart([TrialConfig(), TrialConfig(seed=1)])
    ''
    """
    all_settings = [program_settings(trial) for trial in trials]
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    reasons = []
    for name in names:
        values = list(dict.fromkeys(json.dumps(settings.get(name)) for settings in all_settings))
        if len(values) > 1 and name == "trial":
            reasons.append("full fine-tuning freezes nothing to share")
        elif len(values) > 1:
            reasons.append(f"{name} ({', '.join(value.strip(chr(34)) for value in values[:6])})")
    return "; ".join(reasons)
