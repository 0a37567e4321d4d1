"""The memory of a training step by kind, compared with full fine-tuning and cheaper bases."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import jax

from lorax.config import MeshConfig, TrialConfig
from lorax.errors import LoraxError
from lorax.sweep.cost import largest_step
from lorax.sweep.plan_table import table
from lorax.train.setup import check_trial

MEGA = 1e6
CHEAPER: Mapping[str, Mapping[str, Any]] = {
    "train.base_dtype=bf16": {"base_dtype": "bf16"},
    "train.base_dtype=int8": {"base_dtype": "int8"},
    "train.base_dtype=nf4": {"base_dtype": "nf4"},
    "bf16 base and compute": {"base_dtype": "bf16", "precision": "bf16"},
    "train.remat=true": {"remat": True},
    "nf4, bf16 compute and remat": {"base_dtype": "nf4", "precision": "bf16", "remat": True},
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step in its largest shape.

    Attributes:
      base: frozen weights.
      trained: adapter and head; all weights in full fine-tuning.
      optimizer: its state.
      batch: tokens and labels.
      temporary: activations and gradients that XLA's plan holds at the same time.
    """

    base: int
    trained: int
    optimizer: int
    batch: int
    temporary: int

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(astuple(self))


def memory_of(trial: TrialConfig) -> Memory:
    """The memory of a trial's step, from the sizes of its arrays and XLA's plan of the program.

    Nothing is trained.

    Raises:
      LoraxError: as `lorax.train.setup.check_trial`; a mesh.
    """
    if trial.sweep.mesh != MeshConfig():
        raise LoraxError("the memory table is of a step on one device: leave sweep.mesh out")
    check_trial(trial)
    cost, (state, frozen, _, batch) = largest_step(trial)
    base, trained, optimizer, tokens = map(
        _bytes, (frozen, state.trainable, state.opt_state, batch)
    )
    temporary = cost.memory_bytes - base - trained - optimizer - tokens
    return Memory(base, trained, optimizer, tokens, max(0, temporary))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def alternatives(trial: TrialConfig) -> dict[str, TrialConfig]:
    """The trial, the same by full fine-tuning, and with each setting that lowers memory."""
    full = replace(trial.train, mode="full", base_dtype="fp32", pad_rank=None)
    found = {"full fine-tuning": replace(trial, train=full)}
    if trial.train.mode == "full":
        return found
    found["as asked"] = trial
    for name, changes in CHEAPER.items():
        train = replace(trial.train, **changes)
        if train != trial.train:
            found[f"with {name}"] = replace(trial, train=train)
    return found


def memory_table(found: Mapping[str, Memory]) -> str:
    """Megabytes by kind, in Markdown; the last column is the first row's total over each row's."""
    most = next(iter(found.values())).total
    columns = ("MB", *(field.name for field in fields(Memory)), "total", "times less")
    return table(columns, [_row(name, memory, most) for name, memory in found.items()])


def _row(name: str, memory: Memory, most: int) -> Sequence[str]:
    sizes = (*astuple(memory), memory.total)
    return name, *(f"{size / MEGA:.1f}" for size in sizes), f"{most / memory.total:.1f}"
