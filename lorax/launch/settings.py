"""All settings of a trial: their names, their help, and the names that other libraries use."""

import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from lorax.config import TrialConfig

# Names of Hugging Face's Trainer, PEFT and their example scripts.
SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_norm",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "warmup_steps": "optimizer.warmup_ratio=0.1",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "exclude_modules": "lora.exclude",
    "layers_to_transform": "lora.layers",
    "init_lora_weights": "lora.init",
    "use_rslora": "lora.scaling=rslora",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "steps": "train.max_steps",
    "num_train_steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "train_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.grad_accum",
    "gradient_checkpointing": "train.remat",
    "label_smoothing_factor": "train.label_smoothing",
    "eval_steps": "train.eval_every",
    "save_steps": "train.checkpoint_every",
    "logging_steps": "train.log_every",
    "early_stopping_patience": "train.early_stopping",
    "bf16": "train.precision=bf16",
    "fp16": "train.precision=bf16",
    "torch_dtype": "train.base_dtype",
    "load_in_8bit": "train.base_dtype=int8",
    "load_in_4bit": "train.base_dtype=nf4",
    "max_seq_length": "task.max_length",
    "max_seq_len": "task.max_length",
    "model_max_length": "task.max_length",
    "block_size": "task.max_length",
    "task_name": "task.name",
    "dataset_name": "task.name",
    "train_file": "task.data_dir",
    "max_eval_samples": "task.max_dev_samples",
    "model_name": "model.source",
    "model_name_or_path": "model.source",
    "base_model": "model.source",
    "model_revision": "model.revision",
    "attn_implementation": "model.attention",
    "report_to": "tracking.kind",
    "wandb_project": "tracking.project",
    "run_name": "sweep.name",
    "out_dir": "output_dir",
    "random_seed": "seed",
}


class Setting(NamedTuple):
    """A setting as `--help` shows it.

    Attributes:
      name: including its groups.
      kind: its type, as Python writes it.
      default: as Hydra writes it; a group of `conf/` may have another.
      about: what `lorax/config.py` says.
    """

    name: str
    kind: str
    default: str
    about: str


def setting_names() -> list[str]:
    """The names of all settings, as in overrides."""
    return [setting.name for setting in all_settings()]


def all_settings(kind: Any = TrialConfig, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a dataclass and of the dataclasses in its fields, in order."""
    types, about = typing.get_type_hints(kind), attributes_of(kind)
    for field in dataclasses.fields(kind):
        name, its_type = f"{prefix}{field.name}", types[field.name]
        if dataclasses.is_dataclass(its_type):
            yield from all_settings(its_type, f"{name}.")
        else:
            yield Setting(name, _type_name(its_type), _default(field), about.get(field.name, ""))


def attributes_of(kind: Any) -> dict[str, str]:
    """A class's attributes and their descriptions in its docstring, in one line each."""
    _, _, listed = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def settings_help() -> str:
    """All settings with type, default and description, wrapped to the terminal's width."""
    width = min(100, shutil.get_terminal_size().columns)
    lines, group = [], ""
    for setting in all_settings():
        if (own := setting.name.rpartition(".")[0]) != group:
            lines.append("")
            group = own
        lines.append(f"{setting.name}={setting.default}  ({setting.kind})")
        lines += textwrap.wrap(
            setting.about.replace("`", ""),
            width,
            initial_indent="    ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    return "\n".join(lines).strip()


def _type_name(kind: Any) -> str:
    if kind is Any:
        return "str or list"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
