"""The tokenized data of a trial's config."""

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorax import data
from lorax.config import ModelConfig, TaskConfig, TrainConfig, TrialConfig
from lorax.errors import LoraxError
from lorax.models import load_config, resolve_source
from lorax.runs.content import Content, content_of
from lorax.runtime.process import cache_root


@dataclass(frozen=True, eq=False)
class Dataset:
    """A tokenized task.

    Attributes:
      task: its description.
      train: the training split.
      dev: each dev split.
      layout: the shapes of packed micro-batches in training.
      multiple: number of devices that share the rows of a batch.
      pad_id: token id of the padding.
    """

    task: data.Task
    train: data.Encoded
    dev: dict[str, data.Encoded]
    layout: data.Layout
    multiple: int
    pad_id: int


def cache_key(config: TaskConfig | ModelConfig) -> tuple[tuple[str, Any], ...]:
    """A config as a hashable key of the caches below."""
    return tuple(dataclasses.asdict(config).items())


def load_dataset(config: TrialConfig) -> Dataset:
    """The task in the model's tokens; cached, so that a sweep tokenizes once."""
    train, mesh = config.train, config.sweep.mesh
    content = dataclasses.replace(content_of(config), masks=None)  # changed files are read again
    source = cache_key(config.task), config.model.source, config.model.revision, content
    count = len(_load_splits(*source)[1])  # kept as long as the datasets that are made of them
    return _load_dataset(
        source,
        train.batch_size // train.grad_accum,
        train.max_shapes,
        mesh.data * mesh.fsdp,
        steps_of(train, count),
    )


@lru_cache(maxsize=8)
def _load_dataset(
    source: Any, micro_batch: int, max_shapes: int, multiple: int, steps: int
) -> Dataset:
    task, train, dev, pad_id = _load_splits(*source)
    longest = max(int(split.lengths.max()) for split in (train, *dev.values()))
    layout = data.choose_layout(
        train.lengths,
        micro_batch,
        max_shapes=max_shapes,
        longest=longest,
        multiple=multiple,
        steps=steps,
    )
    return Dataset(task, train, dev, layout, multiple, pad_id)


@lru_cache(maxsize=8)
def _load_splits(
    task_items: tuple[tuple[str, Any], ...], source: str, revision: str | None, content: Content
) -> tuple[data.Task, data.Encoded, dict[str, data.Encoded], int]:
    del content
    config = TaskConfig(**dict(task_items))
    task = data.get_task(config.name)
    base = resolve_source(source, revision)
    tokenizer = data.load_tokenizer(base)
    tokenizer_json = (base / "tokenizer.json").read_bytes()
    folder = data.token_dir(cache_root())

    def read(split_name: str, limit: int | None) -> data.Encoded:
        if task.kind == "causal_lm":
            return data.subsample(
                _read_documents(config, split_name, base, tokenizer, tokenizer_json), limit
            )
        examples = data.subsample(data.load_split(task, split_name, config.data_dir), limit)
        return data.encode_cached(tokenizer, tokenizer_json, examples, config.max_length, folder)

    train = read("train", config.max_train_samples)
    dev = {name: read(name, config.max_dev_samples) for name in task.dev_splits}
    return task, train, dev, _pad_id(tokenizer, source, revision, task)


def _read_documents(
    config: TaskConfig, split: str, base: Path, tokenizer: Any, tokenizer_json: bytes
) -> data.Encoded:
    """A split for a decoder: N documents, or the blocks of a text."""
    documents = data.load_documents(config.name, split, config.data_dir, base)
    return data.encode_documents_cached(
        tokenizer,
        tokenizer_json,
        documents,
        config.max_length,
        data.token_dir(cache_root()),
        eos_id=None if documents.form == "text" else data.find_eos_id(tokenizer, base),
    )


def epoch_steps(config: TrialConfig, dataset: Dataset) -> int:
    """Optimizer steps in one pass over the training split."""
    return math.ceil(len(dataset.train) / config.train.batch_size)


def total_steps(config: TrialConfig, dataset: Dataset) -> int:
    """Optimizer steps of a whole trial."""
    return steps_of(config.train, len(dataset.train))


def steps_of(train: TrainConfig, examples: int) -> int:
    """Optimizer steps of a whole trial on so many examples."""
    return train.max_steps or train.epochs * math.ceil(examples / train.batch_size)


def _pad_id(tokenizer: Any, source: str, revision: str | None, task: data.Task) -> int:
    """The model's padding token; checks that the embeddings cover the tokenizer's ids."""
    is_decoder = task.kind == "causal_lm"
    config = load_config(ModelConfig(source=source, revision=revision), is_decoder=is_decoder)
    if (largest := data.largest_id(tokenizer)) >= config.vocab_size:
        raise LoraxError(
            f"model.source={source}: its tokenizer has token ids up to {largest}, but the model "
            f"only {config.vocab_size} embeddings; they do not belong together"
        )
    return 0 if is_decoder else config.pad_token_id  # no token attends to a decoder's padding
