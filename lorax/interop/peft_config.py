"""PEFT's `adapter_config.json`: what a spec is there, and what one of there is here.

Both libraries select modules by name, by different rules. So a selection is turned into the set
of modules that it means, and that set is named anew: by kind (`query`) where every layer's module
of the kind is in it, one by one otherwise.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorax.lora import LoraSpec

_INITS: dict[Any, str] = {
    True: "kaiming_uniform",
    "gaussian": "gaussian",
    # They differ in the start alone, which a saved adapter has left behind.
    False: "kaiming_uniform",
    "eva": "kaiming_uniform",
    "orthogonal": "kaiming_uniform",
}
_SERVED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (None, "SEQ_CLS", "FEATURE_EXTRACTION"),
    "bias": ("none", None),
    "init_lora_weights": (*_INITS, None),
    "layers_pattern": (None, [], "", "layer", ["layer"]),
}
_READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"),
}
# Options that say nothing about the adapted model's outputs.
_IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config"),
}
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_NAMES_ALONE = re.compile(r"[A-Za-z_.-]+")  # no regex and no number: the same in every layer


def write_config(
    spec: LoraSpec,
    names: Mapping[str, str],
    *,
    task_type: str,
    base_source: str,
    modules_to_save: list[str] | None,
    kinds: Iterable[str],
) -> dict[str, Any]:
    """The config of an adapter of ours.

    Args:
      spec: the adapter's.
      names: path of each adapted kernel to PEFT's name of its module.
      task_type: of PEFT: `SEQ_CLS` or `FEATURE_EXTRACTION`.
      base_source: what PEFT should load as the base.
      modules_to_save: PEFT's names of the modules that are stored whole.
      kinds: PEFT's names, within a layer, of all modules that a layer may have.
    """
    targets, layers = _selection(spec, list(names.values()), kinds)
    ranks = {name: spec.rank_of(path) for path, name in names.items()}
    alphas = {name: _number(spec.alpha_of(path)) for path, name in names.items()}
    inits = {ours: theirs for theirs, ours in reversed(_INITS.items())}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_source,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _number(spec.alpha),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.scaling == "rslora",
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": inits.get(spec.init, True),
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": _pattern(ranks, spec.rank, _short),
        "alpha_pattern": _pattern(alphas, _number(spec.alpha), _short),
        "modules_to_save": modules_to_save,
    }


def check_config(config: Mapping[str, Any]) -> list[str]:
    """What of a config is not served here, an entry an option."""
    faults = []
    for option, value in config.items():
        if option in _SERVED:
            refused = value not in _SERVED[option]
        else:
            refused = bool(value) and option not in _READ | _IRRELEVANT
        if refused:
            faults.append(f"{option}={value!r} is not served")
    missing = [option for option in ("peft_type", "target_modules") if not config.get(option)]
    return faults + [f"{option} is missing" for option in missing]


def selects(config: Mapping[str, Any], name: str, *, is_output: bool = False) -> bool:
    """Whether PEFT adapts the module `name` (its `check_target_module_exists`).

    Args:
      config: of the adapter.
      name: of a linear layer or an embedding.
      is_output: it is the output layer, which `all-linear` spares.
    """
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return False
    if _named(config.get("exclude_modules") or (), name):
        return False
    targets = config["target_modules"]
    if targets == "all-linear":
        return not is_output and not name.endswith("_embeddings")
    layers = _layers(config)
    is_chosen = layers is None or isinstance(targets, str) or _layer_of(name) in layers
    return is_chosen and _named(targets, name)


def read_spec(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    modules: Iterable[str],
    modules_to_save: tuple[str, ...],
) -> LoraSpec:
    """The spec of a PEFT adapter.

    Args:
      config: of the adapter, checked.
      names: path of each adapted kernel of ours to PEFT's name of its module.
      modules: paths of all modules of ours that could be adapted.
      modules_to_save: of ours.

    Raises:
      LoraxError: a value out of its range.
    """
    layers = _layers(config)
    own = {path.rpartition(".")[0]: name for path, name in names.items()}
    universe = [m for m in modules if layers is None or _layer_of(m) in layers]
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks = {module: rank_of(config, name) for module, name in own.items()}
    alphas = {m: _by_pattern(config.get("alpha_pattern"), n, alpha) for m, n in own.items()}
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        scaling="rslora" if config.get("use_rslora") else "lora",
        targets=tuple(_compress(list(own), universe, _kind)),
        layers=layers,
        rank_pattern=_pattern(ranks, rank, _kind),
        alpha_pattern=_pattern(alphas, alpha, _kind),
        dropout=config.get("lora_dropout", 0.0),
        init=_INITS[config.get("init_lora_weights", True) or False],
        modules_to_save=modules_to_save,
    )


def rank_of(config: Mapping[str, Any], name: str) -> Any:
    """The rank that a config gives to the module `name`."""
    return _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _named(chosen: str | Iterable[str], name: str) -> bool:
    if isinstance(chosen, str):
        return re.fullmatch(chosen, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in chosen)


def _layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    return (layers,) if isinstance(layers, int) else tuple(layers)


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[2]) if match else None


def _selection(
    spec: LoraSpec, names: list[str], kinds: Iterable[str]
) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that mean exactly `names`, in any model."""
    everywhere = all(_NAMES_ALONE.fullmatch(name) for name in (*spec.targets, *spec.exclude))
    if spec.layers is None and not everywhere:
        return names, None
    stems = dict.fromkeys(m[0] for name in names if (m := _LAYER.match(name)))
    universe = {stem + kind for stem in stems for kind in kinds} | set(names)
    return _compress(names, universe, _short), list(spec.layers) if spec.layers else None


def _pattern(
    values: Mapping[str, Any], default: Any, naming: Callable[[str], str]
) -> dict[str, Any]:
    """Names to values, wherever they are not the default."""
    pattern: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            chosen = [name for name, v in values.items() if v == value]
            pattern |= dict.fromkeys(_compress(chosen, values, naming), value)
    return pattern


def _compress(
    chosen: list[str], universe: Iterable[str], naming: Callable[[str], str]
) -> list[str]:
    """Few names that mean the `chosen` of the `universe` as last components, and no others.

    >>> names = [f"layer.{i}.{kind}" for i in (0, 1) for kind in ("query", "value")]
    >>> _compress(["layer.0.query", "layer.1.query", "layer.1.value"], names, _kind)
    ['query', 'layer.1.value']
    """
    everything = list(universe)
    result: dict[str, None] = {}
    for name in chosen:
        short = naming(name)
        meant = {n for n in everything if n == short or n.endswith(f".{short}")}
        result[short if meant <= set(chosen) else name] = None
    return list(result)


def _kind(name: str) -> str:
    """A module's name within its layer."""
    return _LAYER.sub("", name)


def _short(name: str) -> str:
    """A kind as PEFT's users write it: `query`, but `attention.output.dense`."""
    last = name.rpartition(".")[2]
    return _kind(name) if last == "dense" else last


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
