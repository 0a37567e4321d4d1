"""Trials that differ in their seed only, and the settings in which the groups differ."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorax.analysis.results import ENDED, Trial
from lorax.analysis.statistics import Summary, summarize
from lorax.config import CONTENT, EARLIER_MASKS
from lorax.effective import effective
from lorax.metric_direction import lower_is_better

MISSING = "\u2013"
MODES = ("head", "lora", "full")
MASKS = CONTENT["masks"]
CONTEXT = ("task.name", "model.name", *CONTENT.values())

_BOOKKEEPING = frozenset(
    {
        *("seed", "sweep", "output_dir"),
        *(
            "train.checkpoint_every",
            "train.checkpoint_minutes",
            "train.keep_checkpoints",
            "train.prefix_cache_gib",
        ),
    }
)
_BOOKKEEPING_PREFIXES = ("tracking.", "sweep.")
_NAMED_BY: dict[str, tuple[str, ...]] = {
    "task.data_dir": ("task.name",),
    "model.source": ("model.name",),
    "model.revision": ("model.name",),
    "task.content": ("task.name",),
    "model.content": ("model.name",),
    "model.tokenizer_content": ("model.name",),
    MASKS: ("model.name", "model.source", "model.dropout", "train.mode", "lora.dropout"),
}
_PART_OF = {key: part for part, key in CONTENT.items()}
_MASKS_NOTE = (
    f"Some trials drew their dropout masks by another dropout generator ({EARLIER_MASKS}, of an "
    "earlier version): their seeds name other masks, so they are rows of their own."
)
_ORDER = (*CONTEXT, "train.mode", "lora.rank", "lora.alpha", "lora.scaling", "lora.targets")
_TUNED_PREFIXES = ("optimizer.",)
_TUNED = frozenset(
    {
        "lora.alpha",
        "lora.alpha_pattern",
        "lora.dropout",
        "train.batch_size",
        "train.epochs",
        "train.max_steps",
        "train.early_stopping",
    }
)


@dataclass(frozen=True)
class Group:
    """Trials of one setting, a seed each.

    Attributes:
      trials: the finished ones with a main metric, by seed: what every mean is taken over.
      diverged: counted beside them, never averaged in.
      repeats: further trials of a seed already counted; left out, as they add no evidence.
      cut: ended early by halving; counted like the diverged ones, for a score from before the
        end is not evidence about the setting at full length.
    """

    trials: tuple[Trial, ...]
    diverged: tuple[Trial, ...] = ()
    repeats: tuple[Trial, ...] = ()
    cut: tuple[Trial, ...] = ()

    @property
    def ended(self) -> tuple[Trial, ...]:
        """All that is counted, a trial a seed."""
        return self.trials + self.diverged + self.cut

    @property
    def constant(self) -> tuple[Trial, ...]:
        """The finished ones that predict the same for every dev example."""
        return tuple(trial for trial in self.trials if trial.is_constant)

    @property
    def has_row(self) -> bool:
        """Whether tables show it: not when halving has cut every trial."""
        return bool(self.trials or self.diverged)

    @property
    def example(self) -> Trial:
        """Any trial of the group, for what all of them share."""
        return self.ended[0]

    @property
    def mode(self) -> str:
        """`lora`, `full` or `head`."""
        return self.example.mode

    @property
    def rank(self) -> int:
        """The LoRA rank, whether or not the mode uses it."""
        return int(self.example.config.get("lora.rank", 0))

    @property
    def metric(self) -> str:
        """The name of the main dev metric."""
        return self.example.metric

    def has(self, key: str) -> bool:
        """Whether a setting has an effect: `lora.*` has none without an adapter."""
        return key in self.settings

    def value(self, key: str) -> Any:
        """The group's value of a setting; None where it has no effect."""
        return self.settings.get(key)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What its trials share, by dotted key."""
        return _settings(self.example)

    def scores(self, epoch: str = "best", metric: str | None = None) -> list[float]:
        """One dev metric a seed at the `best` or `last` epoch, raw; missing ones dropped."""
        scores = (trial.score(epoch, metric) for trial in self.trials)
        return [score for score in scores if math.isfinite(score)]

    def summary(self, epoch: str = "best", metric: str | None = None) -> Summary:
        """Statistics over seeds of `scores`."""
        return summarize(self.scores(epoch, metric))

    def mean(self, key: str) -> float:
        """The mean of a number of `result.json` over the finished trials; nan without any."""
        numbers = [trial.number(key) for trial in self.trials]
        return summarize([x for x in numbers if math.isfinite(x)]).mean

    def signed_score(self) -> float:
        """The mean main metric at the best epoch, signed so that higher is better."""
        sign = -1.0 if lower_is_better(self.metric) else 1.0
        return sign * self.summary().mean


@dataclass(frozen=True)
class Choice:
    """The best of several groups by its mean dev metric.

    Attributes:
      group: the one chosen.
      among: all that were tried: the chosen one, and those without a finished trial too.
    """

    group: Group
    among: tuple[Group, ...]


def group_trials(trials: Iterable[Trial]) -> list[Group]:
    """Groups ended trials by everything but their seed; unfinished ones are passed over.

    Settings without effect (`lorax.effective`) are no difference: a `head` trial is the same at
    every LoRA rank. Trials of other content, or of content that was not recorded, are apart.
    """
    bundles: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        if trial.status in ENDED:
            settings = sorted(_settings(trial).items())
            bundles.setdefault(_freeze(settings), []).append(trial)
    groups = [group for bundle in bundles.values() if (group := _group(bundle)) is not None]
    keys = varying_keys(groups)
    return sorted(groups, key=lambda group: [_sortable(group, key) for key in keys])


def varying_keys(groups: Sequence[Group]) -> tuple[str, ...]:
    """The settings that tell groups apart, in table order.

    `train.mode` is always one of them, and `lora.rank` where any group has an adapter. A key that
    only spells out another one (`model.source` beside `model.name`) is not.
    """
    keys = {key for group in groups for key in group.settings}
    varying = {key for key in keys if _varies(key, groups)}
    varying -= {k for k, names in _NAMED_BY.items() if _determine(names, k, groups)}
    varying |= {"train.mode"}
    if any(group.mode == "lora" for group in groups):
        varying |= {"lora.rank"}
    return tuple(sorted(varying, key=_key_order))


def content_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    """What to know of rows that differ in what they were trained on."""
    varying = [key for key in varying_keys(groups) if key in _PART_OF]
    keys = [key for key in varying if key != MASKS]
    masks = (_MASKS_NOTE,) if MASKS in varying else ()
    if not keys:
        return masks
    parts = " and ".join(_PART_OF[key] for key in keys)
    note = (
        f"Trials were trained on several contents of {parts} under one name (by SHA-256): rows of "
        "different content do not compare."
    )
    if any(group.value(key) is None for group in groups for key in keys):
        note += " Of unknown content are trials of a version that did not record it."
    return (note, *masks)


def constant_settings(groups: Sequence[Group]) -> dict[str, Any]:
    """The settings that all groups share where they have them, by dotted key."""
    shared: dict[str, Any] = {}
    for group in groups:
        for key, value in group.settings.items():
            if not _varies(key, groups):
                shared.setdefault(key, value)
    return dict(sorted(shared.items()))


def is_tuned(key: str) -> bool:
    """Whether a setting is tuned for each rank (learning rate, alpha), not itself compared."""
    return key in _TUNED or key.startswith(_TUNED_PREFIXES)


def partition(groups: Iterable[Group], keys: Iterable[str]) -> list[list[Group]]:
    """Splits groups by their values of `keys`, in order of first appearance."""
    keys = tuple(keys)
    parts: dict[Hashable, list[Group]] = {}
    for group in groups:
        values = tuple(_freeze(group.value(key)) if group.has(key) else None for key in keys)
        parts.setdefault(values, []).append(group)
    return list(parts.values())


def best_choices(groups: Iterable[Group], keys: Iterable[str]) -> list[Choice]:
    """The best group for each combination of values of `keys`, by mean dev metric.

    Only the groups with the largest share of finished trials are chosen from: the mean of a few
    survivors, of divergence or of halving, is no recommendation.
    """
    parts = partition(groups, keys)
    return [Choice(_best(part), tuple(part)) for part in parts if any(g.trials for g in part)]


def _best(part: Sequence["Group"]) -> "Group":
    def share_finished(group: Group) -> float:
        return len(group.trials) / len(group.ended)

    most = max(map(share_finished, part))
    return max((g for g in part if share_finished(g) == most), key=Group.signed_score)


def display(group: Group, key: str) -> str:
    """A group's value of a setting as tables and legends show it; of a digest the beginning."""
    if key == MASKS:
        return f"masks {group.value(key) or EARLIER_MASKS}" if group.has(key) else MISSING
    if key in _PART_OF:
        return f"{_PART_OF[key]} {str(group.value(key) or 'unknown')[:8]}"
    return format_value(group.value(key)) if group.has(key) else MISSING


def format_value(value: Any) -> str:
    """A setting in few characters: `1e-3`, `16`, `none`, `q+v`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _format_float(value)
    if isinstance(value, list | tuple):
        return "+".join(map(format_value, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {format_value(v)}" for k, v in value.items()) or "none"
    return str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole key where two would look the same."""
    last = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return {k: name if last.count(name) == 1 else k for k, name in zip(keys, last, strict=True)}


def _format_float(value: float) -> str:
    if 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def _settings(trial: Trial) -> dict[str, Any]:
    return {
        key: value for key, value in effective(trial.config).items() if not _is_bookkeeping(key)
    }


def _is_bookkeeping(key: str) -> bool:
    return key in _BOOKKEEPING or key.startswith(_BOOKKEEPING_PREFIXES)


def _group(bundle: Sequence[Trial]) -> Group | None:
    """None where nothing can be counted: finished trials without any metric."""
    counted: dict[Hashable, Trial] = {}
    repeats = []
    for trial in sorted(bundle, key=lambda trial: (ENDED.index(trial.status), trial.id)):
        if trial.status == "finished" and not math.isfinite(trial.score()):
            continue
        seed = _freeze(trial.config.get("seed"))
        if seed in counted:
            repeats.append(trial)
        else:
            counted[seed] = trial
    ordered = sorted(counted.values(), key=lambda trial: (str(trial.config.get("seed")), trial.id))
    finished, diverged, cut = (
        tuple(trial for trial in ordered if trial.status == status) for status in ENDED
    )
    return Group(finished, diverged, tuple(repeats), cut) if counted else None


def _varies(key: str, groups: Sequence[Group]) -> bool:
    return len({_freeze(group.value(key)) for group in groups if group.has(key)}) > 1


def _determine(causes: Sequence[str], effect: str, groups: Sequence[Group]) -> bool:
    return not any(_varies(effect, part) for part in partition(groups, causes))


def _key_order(key: str) -> tuple[int, str]:
    return (_ORDER.index(key) if key in _ORDER else len(_ORDER), key)


def _sortable(group: Group, key: str) -> tuple[int, float, str]:
    if key == "train.mode":
        return (MODES.index(group.mode) if group.mode in MODES else len(MODES), 0.0, group.mode)
    value = group.value(key) if group.has(key) else None
    if isinstance(value, int | float):
        return (1, float(value), "")
    return (0, 0.0, "") if value is None else (2, 0.0, format_value(value))


def _freeze(value: Any) -> Hashable:
    freeze: Callable[[Any], Hashable] = _freeze
    if isinstance(value, Mapping):
        return tuple((str(key), freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value
