"""Where a trial lives: a name that its config alone decides."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lorax.config import ADDED, LoraConfig, TrialConfig

ELSEWHERE = ("tracking", "sweep", "output_dir")
NEVER_COUNT = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")


def trial_id(config: TrialConfig) -> str:
    """A readable name ending in a hash of all that can change a trial's numbers.

    Tracking and places are left out, and the adapter's fields where none is trained: the same
    trial asked for twice is one trial.

    >>> trial_id(TrialConfig(seed=1)).rsplit("-", 1)[0]
    'reviews-lora-r8-a16-qv-lr0.001-s1'
    """
    content = dataclasses.asdict(config)
    for name in ELSEWHERE:
        del content[name]
    for name in NEVER_COUNT:
        del content["train"][name]
    for name, value in ADDED.items():  # at what it was before, it is not in a name
        part, _, field = name.partition(".")
        if content[part][field] == value:
            del content[part][field]
    if config.train.mode != "lora":
        content["lora"] = dataclasses.asdict(LoraConfig())
        content["train"]["pad_rank"] = None
    digest = hashlib.sha256(json.dumps(_canonical(content)).encode()).hexdigest()[:8]
    parts = [config.task.name, config.train.mode]
    if config.train.mode == "lora":
        targets = config.lora.targets
        names = targets if isinstance(targets, list | tuple) else [targets]
        label = "+".join(re.sub(r"[^\w-]", "_", str(name)) for name in names)
        parts += [f"r{config.lora.rank}", f"a{config.lora.alpha:g}", label[:24]]
    parts += [f"lr{config.optimizer.lr:g}", f"s{config.seed}", digest]
    return "-".join(parts)


def _canonical(value: Any) -> Any:
    """One spelling of equal numbers; the order of a pattern's entries stays, as it counts."""
    if isinstance(value, dict):
        return {name: _canonical(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_int else value


def trial_dir(config: TrialConfig) -> Path:
    """`<output_dir>/<sweep.name>/<trial id>`."""
    return sweep_dir(config) / trial_id(config)


def sweep_dir(config: TrialConfig) -> Path:
    """`<output_dir>/<sweep.name>`."""
    return Path(config.output_dir) / config.sweep.name
