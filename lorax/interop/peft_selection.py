"""Resolves PEFT's names to modules, and finds few names for a set of modules."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorax.lora import LoraSpec

_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_NAMES_ALONE = re.compile(r"[A-Za-z_.-]+")  # no regex and no number: the same in every layer


def selects(config: Mapping[str, Any], name: str, *, is_spared: bool = False) -> bool:
    """Whether PEFT adapts the module `name` (its `check_target_module_exists`).

    Args:
      config: of the adapter.
      name: of a linear layer or an embedding.
      is_spared: it is an embedding or the output layer, which `all-linear` spares.
    """
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return False
    if _named(config.get("exclude_modules") or (), name):
        return False
    targets = config["target_modules"]
    if targets == "all-linear":
        return not is_spared
    layers = layers_of(config)
    is_chosen = layers is None or isinstance(targets, str) or layer_of(name) in layers
    return is_chosen and _named(targets, name)


def rank_of(config: Mapping[str, Any], name: str) -> Any:
    """The rank that a config gives to the module `name`."""
    return by_pattern(config.get("rank_pattern"), name, config.get("r", 8))


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches `name`, or the default."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _named(chosen: str | Iterable[str], name: str) -> bool:
    if isinstance(chosen, str):
        return re.fullmatch(chosen, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in chosen)


def layers_of(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The layers that a config adapts; None: all."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    return (layers,) if isinstance(layers, int) else tuple(layers)


def layer_of(name: str) -> int | None:
    """The number of a module's layer; None if it is in no layer."""
    match = _LAYER.match(name)
    return int(match[2]) if match else None


def selection(
    spec: LoraSpec, names: list[str], kinds: Iterable[str]
) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that mean exactly `names`, in any model."""
    everywhere = all(_NAMES_ALONE.fullmatch(name) for name in (*spec.targets, *spec.exclude))
    if spec.layers is None and not everywhere:
        return names, None
    stems = dict.fromkeys(m[0] for name in names if (m := _LAYER.match(name)))
    universe = {stem + name for stem in stems for name in kinds} | set(names)
    return compress(names, universe, short_name), list(spec.layers) if spec.layers else None


def pattern_of(
    values: Mapping[str, Any], default: Any, naming: Callable[[str], str]
) -> dict[str, Any]:
    """Names to values, wherever they are not the default."""
    pattern: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            chosen = [name for name, v in values.items() if v == value]
            pattern |= dict.fromkeys(compress(chosen, values, naming), value)
    return pattern


def compress(chosen: list[str], universe: Iterable[str], naming: Callable[[str], str]) -> list[str]:
    """Few names that mean the `chosen` of the `universe` as last components, and no others.

    >>> names = [f"layer.{i}.{kind}" for i in (0, 1) for kind in ("query", "value")]
    >>> compress(["layer.0.query", "layer.1.query", "layer.1.value"], names, kind)
    ['query', 'layer.1.value']
    """
    everything = list(universe)
    result: dict[str, None] = {}
    for name in chosen:
        fits = (s for s in (naming(name), kind(name)) if _meant(s, everything) <= set(chosen))
        result[next(fits, name)] = None
    return list(result)


def _meant(short: str, names: list[str]) -> set[str]:
    return {name for name in names if name == short or name.endswith(f".{short}")}


def kind(name: str) -> str:
    """A module's name within its layer."""
    return _LAYER.sub("", name)


def short_name(name: str) -> str:
    """A kind as PEFT's users write it: `query`, but `attention.output.dense`."""
    last = name.rpartition(".")[2]
    return kind(name) if last == "dense" else last
