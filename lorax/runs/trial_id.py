"""Where a trial lives: a name that its settings and what it is trained on decide."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax.config import ADDED, CONTENT, EARLIER_MASKS, TrialConfig
from lorax.effective import effective

ELSEWHERE = ("tracking", "sweep", "output_dir")
NEVER_COUNT = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "prefix_cache_gib")
Settings = dict[str, Any]


def trial_id(config: TrialConfig) -> str:
    """A readable name ending in a hash of all that can change a trial's numbers.

    Tracking and places are left out, and settings without effect (`lorax.effective`): the same
    trial asked for twice is one trial. The content of its data and base counts where the config
    names it, as the commands do.

    >>> trial_id(TrialConfig(seed=1)).rsplit("-", 1)[0]
    'reviews-lora-r8-a16-qv-lr0.001-s1'
    """
    return _name(_canonical(_settings(config)))


def trial_dir(config: TrialConfig) -> Path:
    """`<output_dir>/<sweep.name>/<trial id>`.

    A trial that an earlier version has trained, whose ids knew neither content nor settings
    without effect, stays where it is: unless it is known to be of other content, or drew its
    dropout masks by another generator.
    """
    sweep = sweep_dir(config)
    place = sweep / trial_id(config)
    if (place / "config.json").exists() or not sweep.exists():
        return place
    earlier = (sweep / name for name in earlier_ids(config))
    return next((other for other in earlier if _has_trained(other, config)), place)


def sweep_dir(config: TrialConfig) -> Path:
    """`<output_dir>/<sweep.name>`."""
    return Path(config.output_dir) / config.sweep.name


def earlier_ids(config: TrialConfig) -> list[str]:
    """The names that a trial of these settings has had in earlier versions, or has without content.

    Of content these knew `task.content` of decoders alone.
    """
    without = dict.fromkeys(CONTENT.values())
    data = CONTENT["data"]
    spelled = _settings(config)
    canonical = _canonical(spelled)
    names = []
    for settings in (spelled, canonical):
        names += [_name(settings | without | {data: settings[data]}), _name(settings | without)]
    own = _name(canonical)
    return [name for name in dict.fromkeys(names) if name != own]


def recorded_content(directory: Path) -> dict[str, str]:
    """What a trial was trained on, by part of `CONTENT`, as far as its `config.json` knows.

    One without the field of the masks' generator is of an earlier version.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        found = {part: _get(config, key) for part, key in CONTENT.items()}
        if "dropout_generator" not in config.get("train", {}):
            found["masks"] = EARLIER_MASKS
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {part: digest for part, digest in found.items() if isinstance(digest, str)}


def _get(config: Mapping[str, Any], key: str) -> Any:
    part, _, field = key.partition(".")
    return config.get(part, {}).get(field)


def _has_trained(directory: Path, config: TrialConfig) -> bool:
    """Whether a directory holds this trial, as far as the content is known."""
    if not any((directory / name).exists() for name in ("config.json", "result.json")):
        return False
    recorded, settings = {"masks": EARLIER_MASKS} | recorded_content(directory), _settings(config)
    return all(settings[CONTENT[part]] in (None, digest) for part, digest in recorded.items())


def _settings(config: TrialConfig) -> Settings:
    """What may count, by dotted key; as every version has spelled it."""
    content = dataclasses.asdict(config)
    for name in ELSEWHERE:
        del content[name]
    for name in NEVER_COUNT:
        del content["train"][name]
    settings = _flatten(content)
    if config.train.mode != "lora":
        adapter = {key: value for key, value in DEFAULTS.items() if key.startswith("lora.")}
        settings |= adapter | {"train.pad_rank": None}
    return settings


def _canonical(settings: Settings) -> Settings:
    """Settings without effect at their defaults, all others in one spelling."""
    found = effective(settings)
    return {key: found.get(key, DEFAULTS[key]) for key in settings}


def _flatten(content: Mapping[str, Any]) -> Settings:
    """Part and field as one key; a mapping below (`lora.rank_pattern`) is a value."""
    flat: Settings = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{field}": item for field, item in value.items()}
        else:
            flat[name] = value
    return flat


def _name(settings: Settings) -> str:
    parts = [settings["task.name"], settings["train.mode"]]
    if settings["train.mode"] == "lora":
        targets = settings["lora.targets"]
        names = targets if isinstance(targets, list | tuple) else [targets]
        label = "+".join(re.sub(r"[^\w-]", "_", str(name)) for name in names)
        parts += [f"r{settings['lora.rank']}", f"a{settings['lora.alpha']:g}", label[:24]]
    parts += [f"lr{settings['optimizer.lr']:g}", f"s{settings['seed']}", _hash(settings)]
    return "-".join(parts)


def _hash(settings: Settings) -> str:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        part, _, field = key.rpartition(".")
        if key in ADDED and value == ADDED[key]:
            continue  # at what it was before it was added, it is not in a name
        (nested.setdefault(part, {}) if part else nested)[field] = _plain(value)
    return hashlib.sha256(json.dumps(nested).encode()).hexdigest()[:8]


def _plain(value: Any) -> Any:
    """One spelling of equal numbers; the order of a pattern's entries stays, as it counts."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_int else value


DEFAULTS = _flatten(dataclasses.asdict(TrialConfig()))
