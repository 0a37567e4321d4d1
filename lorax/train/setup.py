"""From a trial's config to its arrays: data, model, adapter, and what is trained."""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax import data
from lorax.config import LoraConfig, ModelConfig, TaskConfig, TrialConfig
from lorax.errors import LoraxError
from lorax.lora import LoraSpec, count_params, init, mask_of, pad, resolve, split, trainable_mask
from lorax.models import KINDS, abstract_model, load_config, load_model, resolve_source
from lorax.process import cache_root
from lorax.train.check import check_config
from lorax.train.optimizer import Hyper
from lorax.train.step import Frozen, Program

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
HEAD = "head"


@dataclass(frozen=True)
class Dataset:
    """A tokenized task.

    Attributes:
      task: what is known of it.
      train: the training split.
      dev: each dev split.
      layout: the shapes that training's micro-batches are packed into.
      multiple: devices that the rows of a batch are spread over.
      pad_id: token id of the padding.
    """

    task: data.Task
    train: data.Encoded
    dev: dict[str, data.Encoded]
    layout: data.Layout
    multiple: int
    pad_id: int


@dataclass(frozen=True)
class Setup:
    """A trial ready to run: `trainable` and `frozen` are the two sides of the split."""

    program: Program
    trainable: Any
    frozen: Frozen
    spec: LoraSpec | None
    counts: dict[str, int]
    dropout_key: jax.Array


def spec_of(lora: LoraConfig) -> LoraSpec:
    """The LoraSpec of a config, its head among the modules to save."""
    values = {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)}
    return LoraSpec(**values, modules_to_save=(HEAD,))


def check_trial(config: TrialConfig, *, devices_are_here: bool = True) -> None:
    """Refuse whatever can be refused before training: values, targets, data and weights.

    Args:
      config: the trial.
      devices_are_here: False where another process trains it, on a device of its own.

    Raises:
      LoraxError: see `check_config`, `lorax.resolve`, `load_dataset` and `load_model`.
    """
    check_config(config)
    if devices_are_here:
        _check_attention(config)
    task = data.get_task(config.task.name)
    if config.train.mode == "lora":
        shapes, _ = _shapes(_items(config.model), task.num_outputs)
        targets = resolve(shapes, spec_of(config.lora))
        _check_padding(config, max(target.rank for target in targets.values()))
    _check_length(config)
    load_dataset(config)
    _load_model(config, jax.random.key(0))


def _check_attention(config: TrialConfig) -> None:
    is_served = jax.default_backend() == "gpu" and config.train.precision == "bf16"
    if config.model.attention == "cudnn" and not is_served:
        raise LoraxError("model.attention=cudnn needs a GPU and bf16 compute: take xla or einsum")


def _check_padding(config: TrialConfig, rank: int) -> None:
    pad_rank = config.train.pad_rank
    if pad_rank is not None and pad_rank < rank:
        raise LoraxError(f"train.pad_rank={pad_rank} is below rank {rank} of the adapter")


def _check_length(config: TrialConfig) -> None:
    outputs = data.get_task(config.task.name).num_outputs
    _, limit = _shapes(_items(config.model), outputs)
    if config.task.max_length > limit:
        raise LoraxError(
            f"task.max_length={config.task.max_length} is above the {limit} positions of "
            f"model.source={config.model.source}"
        )


def _items(config: TaskConfig | ModelConfig) -> tuple[tuple[str, Any], ...]:
    """A config as a hashable key of the caches below."""
    return tuple(dataclasses.asdict(config).items())


@lru_cache(maxsize=8)
def _shapes(model: tuple[tuple[str, Any], ...], outputs: int) -> tuple[Any, int]:
    """(shapes of the parameters, most positions) of a model, without its weights."""
    abstract = abstract_model(ModelConfig(**dict(model)), outputs)
    return nnx.to_pure_dict(nnx.state(abstract)), abstract.encoder.config.max_length


def frozen_shapes(config: TrialConfig) -> Any:
    """Shapes of the base's frozen weights, as they are when not quantized; None elsewhere."""
    outputs = data.get_task(config.task.name).num_outputs
    base, _ = _shapes(_items(config.model), outputs)
    if config.train.mode == "lora":
        mask = mask_of(base, (HEAD,))
    else:
        mask = _mask_without_lora({"base": base}, config.train.mode)["base"]
    return split(base, mask)[1]


def load_dataset(config: TrialConfig) -> Dataset:
    """The task in the model's tokens; kept, so that a sweep tokenizes once."""
    train, mesh = config.train, config.sweep.mesh
    return _load_dataset(
        (_items(config.task), config.model.source, config.model.revision),
        train.batch_size // train.grad_accum,
        train.max_shapes,
        mesh.data * mesh.fsdp,
    )


@lru_cache(maxsize=8)
def _load_dataset(source: Any, micro_batch: int, max_shapes: int, multiple: int) -> Dataset:
    task, train, dev, pad_id = _load_splits(*source)
    longest = max(int(split.lengths.max()) for split in (train, *dev.values()))
    layout = data.choose_layout(
        train.lengths, micro_batch, max_shapes=max_shapes, longest=longest, multiple=multiple
    )
    return Dataset(task, train, dev, layout, multiple, pad_id)


@lru_cache(maxsize=4)
def _load_splits(
    task_items: tuple[tuple[str, Any], ...], source: str, revision: str | None
) -> tuple[data.Task, data.Encoded, dict[str, data.Encoded], int]:
    config = TaskConfig(**dict(task_items))
    task = data.get_task(config.name)
    base = resolve_source(source, revision)
    tokenizer = data.load_tokenizer(base)
    content = (base / "tokenizer.json").read_bytes()
    folder = data.token_dir(cache_root())

    def read(split_name: str, limit: int | None) -> data.Encoded:
        examples = data.subsample(data.load_split(task, split_name, config.data_dir), limit)
        return data.encode_cached(tokenizer, content, examples, config.max_length, folder)

    train = read("train", config.max_train_samples)
    dev = {name: read(name, config.max_dev_samples) for name in task.dev_splits}
    return task, train, dev, _pad_id(tokenizer, source, revision)


def epoch_steps(config: TrialConfig, dataset: Dataset) -> int:
    """Optimizer steps in one pass over the training split."""
    return math.ceil(len(dataset.train) / config.train.batch_size)


def total_steps(config: TrialConfig, dataset: Dataset) -> int:
    """Optimizer steps of a whole trial."""
    train = config.train
    return train.max_steps or train.epochs * epoch_steps(config, dataset)


def _pad_id(tokenizer: Any, source: str, revision: str | None) -> int:
    """The model's padding token; its vocabulary has to hold all of the tokenizer's."""
    config = load_config(ModelConfig(source=source, revision=revision))
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise LoraxError(
            f"model.source={source}: its tokenizer has {tokenizer.get_vocab_size()} tokens, but "
            f"the model only {config.vocab_size}; they do not belong together"
        )
    return config.pad_token_id


def _load_model(config: TrialConfig, key: jax.Array) -> Any:
    base_dtype = config.train.base_dtype
    return load_model(
        config.model,
        data.get_task(config.task.name).num_outputs,
        key=key,
        dtype=DTYPES[config.train.precision],
        param_dtype=DTYPES.get(base_dtype, DTYPES[config.train.precision]),
        remat=config.train.remat,
        quantized=base_dtype if base_dtype in KINDS else None,
        on_host=config.sweep.mesh.fsdp > 1,  # no device may be large enough for it
    )


def hyper_of(config: TrialConfig, factor: float = 1.0) -> Hyper:
    """The optimizer's data when the schedule stands at `factor` of its peak."""
    o = config.optimizer
    head_lr = o.lr if o.head_lr is None else o.head_lr
    clip = np.inf if o.clip_norm is None else o.clip_norm
    values = (o.lr * factor, head_lr * factor, o.weight_decay, clip, o.b1, o.b2, o.eps)
    return Hyper(*(np.float32(value) for value in values))


def prepare(config: TrialConfig) -> Setup:
    """The arrays of a trial, a pure function of its config.

    The adapter's draw depends on the seed and each target's path alone, the head's on the
    seed: trials that differ in rank, alpha or targets start from the same numbers.
    """
    lora_key, head_key, dropout_key = jax.random.split(jax.random.key(config.seed), 3)
    task, train = data.get_task(config.task.name), config.train
    model = _load_model(config, head_key)
    graphdef, state = nnx.split(model)
    base = nnx.to_pure_dict(state)
    mode = config.train.mode
    spec = spec_of(config.lora) if mode == "lora" else None
    shapes, _ = _shapes(_items(config.model), task.num_outputs)  # a quantized base has others
    lora = init(lora_key, shapes, spec) if spec else {}
    adapter_params = count_params(lora)
    if spec and train.pad_rank:
        lora = pad(lora, train.pad_rank)
    params = {"base": base, "lora": lora}
    mask = trainable_mask(params, spec) if spec else _mask_without_lora(params, mode)
    trainable, frozen = split(params, mask)
    scales = {path: jnp.float32(spec.scale(path)) for path in lora} if spec else {}
    program = Program(
        graphdef=graphdef,
        kind=task.kind,
        lora_dropout=spec.dropout if spec else 0.0,
        model_dropout=_has_dropout(model),
        grad_accum=train.grad_accum,
        saves_memory=train.remat or train.base_dtype in KINDS,
    )
    counts = _counts(shapes, adapter_params, mode)
    return Setup(program, trainable, Frozen(frozen, scales), spec, counts, dropout_key)


def _counts(base: dict[str, Any], adapter: int, mode: str) -> dict[str, int]:
    head = count_params(base[HEAD])
    encoder = count_params(base) - head
    return {
        "adapter_params": adapter,
        "head_params": head,
        "base_params": encoder,
        "trainable_params": adapter + head + (encoder if mode == "full" else 0),
        "total_params": adapter + head + encoder,
    }


def _has_dropout(model: Any) -> bool:
    c = model.encoder.config
    rates = (c.hidden_dropout_prob, c.attention_probs_dropout_prob, c.classifier_dropout)
    return any(rate for rate in rates)


def _mask_without_lora(params: dict[str, Any], mode: str) -> dict[str, Any]:
    modules = (HEAD, "encoder") if mode == "full" else (HEAD,)
    return {"base": mask_of(params["base"], modules), "lora": {}}
