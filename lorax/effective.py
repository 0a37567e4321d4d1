"""Which settings of a trial have an effect, each spelled in one way.

Ids, packs and reports share this rule: trials whose effective settings are equal are one trial.
"""

import re
from collections.abc import Mapping
from typing import Any

PATTERNS = ("lora.rank_pattern", "lora.alpha_pattern")
SETS = ("lora.targets", "lora.exclude", "lora.layers")  # lists whose order has no effect
PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a trial's numbers, in their order.

    - Without an adapter `lora.*` and `train.pad_rank` have no effect.
    - `train.epochs` has none beside `train.max_steps`.
    - The head's rate is `optimizer.head_lr`, or `optimizer.lr` where that is None. In mode `head`
      nothing else is trained, so that its rate is all there is.
    - Of `lora.rank_pattern` and `lora.alpha_pattern` the first match counts. The order of two
      entries has no effect if they have one value, or if no module has both names.
    - The order of `lora.targets`, `lora.exclude` and `lora.layers` has no effect.

    Args:
      settings: a trial's by dotted key, e.g. `{"lora.rank": 8, "seed": 0}`; some may be missing.

    >>> effective({"train.max_steps": 9, "train.epochs": 2, "lora.targets": ["v", "q"]})
    {'train.max_steps': 9, 'lora.targets': ['q', 'v']}
    """
    mode = settings.get("train.mode", "lora")
    found = {key: value for key, value in settings.items() if _has_effect(key, mode, settings)}
    for key in SETS:
        if isinstance(found.get(key), list | tuple):
            found[key] = sorted(set(found[key]), key=str)
    if isinstance(targets := found.get("lora.targets"), list) and len(targets) == 1:
        found["lora.targets"] = targets[0]
    for key in PATTERNS:
        if isinstance(found.get(key), Mapping):
            found[key] = in_canonical_order(found[key])
    return found | _rates(mode, found)


def _has_effect(key: str, mode: str, settings: Mapping[str, Any]) -> bool:
    if mode != "lora" and (key.startswith("lora.") or key == "train.pad_rank"):
        return False
    return key != "train.epochs" or settings.get("train.max_steps") is None


def _rates(mode: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    lr, head_lr = settings.get("optimizer.lr"), settings.get("optimizer.head_lr")
    if head_lr is None or (mode != "head" and head_lr != lr):
        return {}
    return {"optimizer.lr": head_lr, "optimizer.head_lr": None}


def in_canonical_order(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """The first of all orders of a pattern's entries that name the same adapter.

    >>> in_canonical_order({"value": 4, "query": 2}), in_canonical_order({".*": 4, "query": 2})
    ({'query': 2, 'value': 4}, {'.*': 4, 'query': 2})
    """
    rest, ordered = list(pattern.items()), {}
    while rest:
        free = [e for n, e in enumerate(rest) if all(_may_swap(e, other) for other in rest[:n])]
        name, value = min(free, key=lambda entry: entry[0])
        ordered[name] = value
        rest.remove((name, value))
    return ordered


def _may_swap(one: tuple[str, Any], other: tuple[str, Any]) -> bool:
    return one[1] == other[1] or _are_disjoint(one[0], other[0])


def _are_disjoint(one: str, other: str) -> bool:
    """Whether no module can have both names; of a regex that is not known."""
    if not (PLAIN_NAME.fullmatch(one) and PLAIN_NAME.fullmatch(other)):
        return False
    return not (f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}"))
