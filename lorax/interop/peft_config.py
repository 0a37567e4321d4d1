"""PEFT's `adapter_config.json`: conversion from and to a LoraSpec.

Both libraries select modules by name, but by different rules. A selection is therefore resolved
to its set of modules, which then gets new names: by kind (`query`) if the set has every layer's
module of that kind, one by one otherwise.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lorax.interop.peft_modules import Module
from lorax.interop.peft_selection import (
    by_pattern,
    compress,
    kind,
    layer_of,
    layers_of,
    pattern_of,
    rank_of,
    selection,
    short_name,
)
from lorax.lora import LoraSpec
from lorax.models.families import family_of

_INITS: dict[Any, str] = {
    True: "kaiming_uniform",
    "gaussian": "gaussian",
    # They differ in the initial values only, which do not matter for a saved adapter.
    False: "kaiming_uniform",
    "eva": "kaiming_uniform",
    "orthogonal": "kaiming_uniform",
    "mica": "kaiming_uniform",
}
# These change the base's weights when training starts, so that the adapter fits no other base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_SERVED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (*_INITS, None),
    "layers_pattern": (None, [], "", *(p for n in ("layer", "layers", "h") for p in (n, [n]))),
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


def write_config(
    spec: LoraSpec,
    modules: Mapping[str, Module],
    *,
    task_type: str,
    base_source: str,
    revision: str | None,
    modules_to_save: list[str] | None,
    kinds: Iterable[str],
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """PEFT's config of a lorax adapter.

    Args:
      spec: the adapter's.
      modules: PEFT's name of each adapted module to its numbers.
      task_type: of PEFT: `SEQ_CLS`, `FEATURE_EXTRACTION` or `CAUSAL_LM`.
      base_source: what PEFT should load as the base.
      revision: of it on the hub.
      modules_to_save: PEFT's names of the modules that are stored whole.
      kinds: PEFT's names, within a layer, of all modules that a layer may have.
      fan_in_fan_out: the adapted linear layers store their weights as (inputs, outputs).
    """
    targets, layers = selection(spec, list(modules), kinds)
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: _number(module.alpha) for name, module in modules.items()}
    rank, alpha = _default(spec.rank, ranks), _default(_number(spec.alpha), alphas)
    inits = {ours: theirs for theirs, ours in reversed(_INITS.items())}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_source,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.scaling == "rslora",
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": inits.get(spec.init, True),
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": pattern_of(ranks, rank, short_name),
        "alpha_pattern": pattern_of(alphas, alpha, short_name),
        "modules_to_save": modules_to_save,
    }


def _default(value: Any, values: Mapping[str, Any]) -> Any:
    """The spec's own value, or the first module's if no module has the spec's value."""
    return value if value in values.values() else next(iter(values.values()), value)


def check_config(config: Mapping[str, Any], model_type: str) -> list[str]:
    """The options of a config that are not supported for a family, one entry per option.

    For another method than LoRA, whose options have other meanings, only its name is reported.
    """
    if (kind := config.get("peft_type")) != "LORA":
        return [f"peft_type={kind!r} is not served; LORA is" if kind else "peft_type is missing"]
    family, tasks = family_of(model_type), (None, "SEQ_CLS", "FEATURE_EXTRACTION")
    served = _SERVED | {"task_type": (*tasks, "CAUSAL_LM") if family.is_decoder else tasks}
    if any(not rule.transposed for rule in family.rules):
        served |= {"fan_in_fan_out": (None, False, True)}  # PEFT sets it itself, layer by layer
    faults = []
    for option, value in config.items():
        if option in served:
            refused = value not in served[option]
        else:
            refused = bool(value) and option not in _READ | _IRRELEVANT
        if refused:
            faults.append(f"{option}={value!r} is not served{_conversion(option, value)}")
    return faults if config.get("target_modules") else [*faults, "target_modules is missing"]


def _conversion(option: str, value: Any) -> str:
    """How PEFT converts an adapter with this option to a supported one; empty if it cannot."""
    kind = str(value).lower()
    if option != "init_lora_weights" or not kind.startswith(_CHANGE_THE_BASE):
        return ""
    own_base = (
        "model.unload().save_pretrained(<base>) in PEFT writes the base that it fits; then set "
        "init_lora_weights to true in adapter_config.json"
    )
    if kind.startswith("loftq"):
        return f", since it changes the base's weights: {own_base}"
    return (
        ", since it changes the base's weights: convert it in PEFT by model.save_pretrained("
        "<folder>, path_initial_model_for_weight_conversion=<the adapter saved before training>); "
        f"without that adapter, {own_base}"
    )


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
    layers = layers_of(config)
    own = {path.rpartition(".")[0]: name for path, name in names.items()}
    universe = [m for m in modules if layers is None or layer_of(m) in layers]
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks = {module: rank_of(config, name) for module, name in own.items()}
    alphas = {m: by_pattern(config.get("alpha_pattern"), n, alpha) for m, n in own.items()}
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        scaling="rslora" if config.get("use_rslora") else "lora",
        targets=tuple(compress(list(own), universe, kind)),
        layers=layers,
        rank_pattern=pattern_of(ranks, rank, kind),
        alpha_pattern=pattern_of(alphas, alpha, kind),
        dropout=config.get("lora_dropout", 0.0),
        init=_INITS[config.get("init_lora_weights", True) or False],
        modules_to_save=modules_to_save,
    )


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
