"""Checks of a trial's config that need no data, weights or compiler."""

import math
from typing import Any

from lorax.config import TrialConfig
from lorax.data import get_task
from lorax.errors import LoraxError
from lorax.models.layers.quantization import KINDS
from lorax.train.schedule import SCHEDULES

MODES = ("lora", "full", "head")
PRECISIONS = ("fp32", "bf16")
BASE_DTYPES = (*PRECISIONS, *KINDS)
TRACKERS = ("jsonl", "wandb", "none")


def check_config(config: TrialConfig) -> None:
    """Refuse values out of range.

    Raises:
      LoraxError: names the key, its value and the valid values.
    """
    get_task(config.task.name)
    if not 0 <= config.seed < 2**32:
        raise LoraxError(f"seed={config.seed} is not in [0, 2**32)")
    train, optimizer = config.train, config.optimizer
    _one_of("train.mode", train.mode, MODES)
    _one_of("train.precision", train.precision, PRECISIONS)
    _one_of("train.base_dtype", train.base_dtype, BASE_DTYPES)
    _one_of("optimizer.schedule", optimizer.schedule, SCHEDULES)
    _one_of("tracking.kind", config.tracking.kind, TRACKERS)
    for name in ("epochs", "batch_size", "grad_accum", "eval_batch_size", "max_shapes",
                 "log_every"):  # fmt: skip
        _at_least_one(f"train.{name}", getattr(train, name))
    for name in ("max_steps", "pad_rank", "checkpoint_every", "eval_every", "early_stopping"):
        _at_least_one(f"train.{name}", getattr(train, name), optional=True)
    if not 0 <= train.prefix_cache_gib < math.inf:
        raise LoraxError(f"train.prefix_cache_gib={train.prefix_cache_gib} is negative")
    _positive("train.checkpoint_minutes", train.checkpoint_minutes, optional=True)
    for name in ("max_train_samples", "max_dev_samples"):
        _at_least_one(f"task.{name}", getattr(config.task, name), optional=True)
    if config.task.max_length < 4:
        raise LoraxError(f"task.max_length={config.task.max_length} is below 4")
    if train.batch_size % train.grad_accum:
        raise LoraxError(
            f"train.grad_accum={train.grad_accum} does not divide "
            f"train.batch_size={train.batch_size}"
        )
    task = get_task(config.task.name)
    if not 0 <= train.label_smoothing < 1:
        raise LoraxError(f"train.label_smoothing={train.label_smoothing} is not in [0, 1)")
    if train.label_smoothing and task.kind == "regression":
        raise LoraxError(
            f"train.label_smoothing={train.label_smoothing}: task {task.name} is a regression, "
            "which has no classes to smooth over"
        )
    if not task.num_outputs:
        _refuse_head_settings(config)
    if train.mode == "full" and train.base_dtype != "fp32":
        raise LoraxError(
            f"train.base_dtype={train.base_dtype} is for a frozen base; train.mode=full needs fp32"
        )
    if train.base_dtype in KINDS and config.sweep.mesh.fsdp > 1:
        raise LoraxError(
            f"train.base_dtype={train.base_dtype} is not served on sweep.mesh.fsdp="
            f"{config.sweep.mesh.fsdp}, which cuts kernels: take bf16, or fsdp=1"
        )
    _check_optimizer(config)


def _refuse_head_settings(config: TrialConfig) -> None:
    """Refuse a head's settings for a language model: they would change its id and nothing else."""
    name = config.task.name
    if config.train.mode == "head":
        raise LoraxError(f"train.mode=head: task {name} has no head to train; take lora or full")
    if config.optimizer.head_lr is not None:
        given = config.optimizer.head_lr
        raise LoraxError(f"optimizer.head_lr={given}: task {name} has no head; leave it null")


def _check_optimizer(config: TrialConfig) -> None:
    optimizer = config.optimizer
    _positive("optimizer.lr", optimizer.lr)
    _positive("optimizer.head_lr", optimizer.head_lr, optional=True)
    _positive("optimizer.clip_norm", optimizer.clip_norm, optional=True)
    _positive("optimizer.eps", optimizer.eps)
    for name in ("b1", "b2", "warmup_ratio"):
        value = getattr(optimizer, name)
        if not 0 <= value < 1:
            raise LoraxError(f"optimizer.{name}={value} is not in [0, 1)")
    if not 0 <= optimizer.weight_decay < math.inf:
        raise LoraxError(f"optimizer.weight_decay={optimizer.weight_decay} is negative")


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise LoraxError(f"{name}={value!r} is unknown; use one of {', '.join(options)}")


def _at_least_one(name: str, value: int | None, *, optional: bool = False) -> None:
    if not (optional and value is None) and (value is None or value < 1):
        raise LoraxError(f"{name}={value} is not a whole number of at least 1")


def _positive(name: str, value: Any, *, optional: bool = False) -> None:
    if not (optional and value is None) and not 0 < value < math.inf:
        raise LoraxError(f"{name}={value} is not a positive number")
