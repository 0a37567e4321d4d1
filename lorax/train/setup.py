"""The arrays of a trial's config: data, model, adapter, and the trainable part."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax import data
from lorax.config import (
    LoraConfig,
    MeshConfig,
    ModelConfig,
    SweepConfig,
    TaskConfig,
    TrainConfig,
    TrialConfig,
)
from lorax.errors import LoraxError
from lorax.lora import (
    LoraSpec,
    Target,
    count_params,
    init,
    mask_of,
    pad,
    resolve,
    split,
    trainable_mask,
)
from lorax.models import (
    KINDS,
    abstract_model,
    check_checkpoint,
    dropout_rates,
    load_model,
)
from lorax.runs.content import Content, checked_content
from lorax.runs.results import Counts
from lorax.train.dataset import cache_key, load_dataset
from lorax.train.mesh import base_shardings, make_mesh
from lorax.train.optimizer import Hyper
from lorax.train.step import Frozen, Program
from lorax.train.validate import check_config

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
HEAD = "head"
LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Setup:
    """A trial ready to run: `trainable` and `frozen` are the two sides of the split.

    `content` identifies its data and base, `width` is the width of hidden states.
    """

    program: Program
    trainable: Any
    frozen: Frozen
    spec: LoraSpec | None
    counts: Counts
    dropout_key: jax.Array
    content: Content
    width: int


def spec_of(lora: LoraConfig, modules_to_save: tuple[str, ...] = (HEAD,)) -> LoraSpec:
    """The LoraSpec of a config; the modules to save include a classifier's head."""
    values = {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)}
    return LoraSpec(**values, modules_to_save=modules_to_save)


def _trial_spec(config: TrialConfig) -> LoraSpec:
    return spec_of(config.lora, _heads(config))


def _outputs(config: TrialConfig) -> int:
    return data.get_task(config.task.name).num_outputs


def _heads(config: TrialConfig) -> tuple[str, ...]:
    """The modules that are trained in full with an adapter; none for a language model."""
    return (HEAD,) if _outputs(config) else ()


def check_trial(config: TrialConfig, *, devices_are_here: bool = True) -> None:
    """Check all that can be checked before training: values, targets, data and weights.

    Args:
      config: the trial.
      devices_are_here: False if another process trains it on its own device.

    Raises:
      LoraxError: see `check_config`, `lorax.resolve`, `load_dataset` and `load_model`.
    """
    check_config(config)
    checked_content(config)
    if devices_are_here:
        _check_attention(config)
    if targets := targets_of(config):
        _check_padding(config, max(target.rank for target in targets))
    _check_length(config)
    load_dataset(config)
    if devices_are_here:
        mesh = dataclasses.astuple(config.sweep.mesh)
        _check_model(cache_key(config.model), config.task.name, _storage(config.train), mesh)
    else:
        check_checkpoint(config.model, _outputs(config))


def targets_of(config: TrialConfig) -> list[Target]:
    """The kernels that a trial adapts; none without an adapter."""
    if config.train.mode != "lora":
        return []
    shapes, _ = _shapes(cache_key(config.model), _outputs(config))
    return list(resolve(shapes, _trial_spec(config)).values())


def _storage(train: TrainConfig) -> tuple[str, str, str, bool]:
    """The settings that decide the form in which a base is stored."""
    return train.mode, train.precision, train.base_dtype, train.remat


@lru_cache(maxsize=64)
def _check_model(
    model: tuple[tuple[str, Any], ...],
    task: str,
    storage: tuple[str, str, str, bool],
    mesh: tuple[Any, ...],
) -> None:
    """Load a model once for all trials of a sweep with the same settings of it."""
    mode, precision, base_dtype, remat = storage
    train = TrainConfig(mode=mode, precision=precision, base_dtype=base_dtype, remat=remat)
    sweep = SweepConfig(mesh=MeshConfig(*mesh))
    trial = TrialConfig(TaskConfig(task), ModelConfig(**dict(model)), train=train, sweep=sweep)
    _load_model(trial, jax.random.key(0))


def _check_attention(config: TrialConfig) -> None:
    is_served = jax.default_backend() == "gpu" and config.train.precision == "bf16"
    if config.model.attention == "cudnn" and not is_served:
        raise LoraxError("model.attention=cudnn needs a GPU and bf16 compute: take xla or einsum")


def _check_padding(config: TrialConfig, rank: int) -> None:
    pad_rank = config.train.pad_rank
    if pad_rank is not None and pad_rank < rank:
        raise LoraxError(f"train.pad_rank={pad_rank} is below rank {rank} of the adapter")


def _check_length(config: TrialConfig) -> None:
    _, limit = _shapes(cache_key(config.model), _outputs(config))
    if config.task.max_length > limit:
        raise LoraxError(
            f"task.max_length={config.task.max_length} is above the {limit} positions of "
            f"model.source={config.model.source}"
        )


@lru_cache(maxsize=8)
def _shapes(model: tuple[tuple[str, Any], ...], outputs: int) -> tuple[Any, int]:
    """(shapes of the parameters, maximum positions) of a model, without loading its weights."""
    abstract = abstract_model(ModelConfig(**dict(model)), outputs)
    return nnx.to_pure_dict(nnx.state(abstract)), abstract.config.max_length


def frozen_shapes(config: TrialConfig) -> Any:
    """Shapes of the base's frozen weights before quantization; None for other leaves."""
    base, _ = _shapes(cache_key(config.model), _outputs(config))
    mask = _mask_without_lora({"base": base}, config)["base"]
    return jax.tree.map(lambda is_trained, leaf: None if is_trained else leaf, mask, base)


def _load_model(config: TrialConfig, key: jax.Array) -> Any:
    base_dtype = config.train.base_dtype
    return load_model(
        config.model,
        _outputs(config),
        key=key,
        labels=data.get_task(config.task.name).labels,
        dtype=DTYPES[config.train.precision],
        param_dtype=DTYPES.get(base_dtype, DTYPES[config.train.precision]),
        remat=config.train.remat,
        quantized=base_dtype if base_dtype in KINDS else None,
        shardings=_shardings(config),
        on_host=config.sweep.mesh.fsdp > 1,  # no device may be large enough for it
    )


def _shardings(config: TrialConfig) -> Any:
    """The shardings of a frozen base; None if it is trained, or on one device."""
    mesh = config.sweep.mesh
    if mesh.fsdp == 1 or config.train.mode == "full":
        return None
    return base_shardings(make_mesh(mesh.trial, mesh.data, mesh.fsdp))


def hyper_of(config: TrialConfig, factor: float = 1.0) -> Hyper:
    """The optimizer's hyperparameters when the schedule is at `factor` of its peak."""
    o = config.optimizer
    head_lr = o.lr if o.head_lr is None else o.head_lr
    clip = np.inf if o.clip_norm is None else o.clip_norm
    values = (o.lr * factor, head_lr * factor, o.weight_decay, clip, o.b1, o.b2, o.eps)
    return Hyper(*(np.float32(value) for value in values))


def prepare(config: TrialConfig) -> Setup:
    """The arrays of a trial, a pure function of its config and of the base's files.

    The adapter's draw depends on the seed and each target's path only, the head's on the seed
    only: trials that differ in rank, alpha or targets start from the same numbers.

    Raises:
      LoraxError: see `load_model` and `checked_content`.
    """
    content = checked_content(config)
    lora_key, head_key, dropout_key = jax.random.split(jax.random.key(config.seed), 3)
    task, train = data.get_task(config.task.name), config.train
    model = _load_model(config, head_key)
    graphdef, state = nnx.split(model)
    base = nnx.to_pure_dict(state)
    mode = config.train.mode
    spec = _trial_spec(config) if mode == "lora" else None
    shapes, _ = _shapes(cache_key(config.model), task.num_outputs)  # a quantized base has others
    lora = init(lora_key, shapes, spec) if spec else {}
    adapter_params = count_params(lora)
    if spec and train.pad_rank:
        lora = pad(lora, train.pad_rank)
    params = {"base": base, "lora": lora}
    mask = trainable_mask(params, spec) if spec else _mask_without_lora(params, config)
    trainable, frozen = split(params, mask)
    scales = {path: jnp.float32(spec.scale(path)) for path in lora} if spec else {}
    program = Program(
        graphdef=graphdef,
        kind=task.kind,
        lora_dropout=spec.dropout if spec else 0.0,
        model_dropout=any(dropout_rates(model.config).values()),
        grad_accum=train.grad_accum,
        label_smoothing=train.label_smoothing,
        saves_memory=train.remat or train.base_dtype in KINDS,
        frozen_layers=_frozen_layers(mode, model.config, lora),
        reads_features=mode == "head",
    )
    counts = _counts(shapes, adapter_params, mode)
    width = model.config.hidden_size
    return Setup(
        program, trainable, Frozen(frozen, scales), spec, counts, dropout_key, content, width
    )


def _frozen_layers(mode: str, config: Any, lora: Mapping[str, Any]) -> int:
    """Number of first layers with the same outputs in every step; all of them in mode `head`."""
    rates = {name: rate for name, rate in dropout_rates(config).items() if "classifier" not in name}
    if mode == "full" or any(rates.values()):
        return 0
    return lowest_trained_layer(list(lora), config.num_hidden_layers)


def lowest_trained_layer(paths: Sequence[str], layers: int) -> int:
    """The first layer with a trained part, given the paths of adapted kernels; `layers` for none.

    Modules before the layers count as layer 0, an output layer as one above the last.

    >>> lowest_trained_layer(["encoder.layers.7.attention.query.kernel"], layers=12)
    7
    >>> lowest_trained_layer(["encoder.embeddings.word.embedding"], layers=12)
    0
    """

    def layer_of(path: str) -> int:
        found = LAYER.search(path)
        return int(found[1]) if found else layers if path.startswith("lm_head.") else 0

    return min((layer_of(path) for path in paths), default=layers)


def _counts(base: dict[str, Any], adapter: int, mode: str) -> Counts:
    head = count_params(base.get(HEAD, {}))
    rest = count_params(base) - head
    return {
        "adapter_params": adapter,
        "head_params": head,
        "base_params": rest,
        "trainable_params": adapter + head + (rest if mode == "full" else 0),
        "total_params": adapter + head + rest,
    }


def _mask_without_lora(params: dict[str, Any], config: TrialConfig) -> dict[str, Any]:
    modules = tuple(params["base"]) if config.train.mode == "full" else _heads(config)
    return {"base": mask_of(params["base"], modules), "lora": {}}
