"""The files of an adapter: a trial's trained parameters, without the frozen base."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lorax.errors import LoraxError
from lorax.lora import LoraSpec
from lorax.runs.checkpoints import flatten
from lorax.runs.files import os_faults


def save_adapter(path: Path, trainable: Any, spec: LoraSpec | None, about: dict[str, Any]) -> int:
    """Write a trial's trained parameters, without the frozen base.

    Args:
      path: a folder, replaced if present.
      trainable: the trained side of `lorax.split`.
      spec: rank, alpha, targets and so on; None if no adapter was trained.
      about: JSON-able facts, such as the base's source.

    Returns:
      Bytes on disk.
    """
    record = {**about, "spec": dataclasses.asdict(spec) if spec else None}
    with os_faults(path):
        ocp.save(path.absolute(), flatten(trainable), overwrite=True, custom_metadata=record)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def load_adapter(path: Path) -> tuple[dict[str, jax.Array], LoraSpec | None, dict[str, Any]]:
    """(trained leaves by path, spec, facts) of `save_adapter`.

    The leaves of targets are `lora.<target>.a` and `.b`; `lora_tree` nests them.

    Raises:
      LoraxError: the adapter is missing or damaged.
    """
    try:
        flat = ocp.load(path.absolute())
        record = dict(ocp.metadata(path.absolute()).custom_metadata)
        values = record.pop("spec")
        spec = LoraSpec(**_tuples(values)) if values else None
    except Exception as fault:
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise LoraxError(f"{path}: not a readable adapter ({reason})") from fault
    return flat, spec, record


def lora_tree(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The LoRA tree within the leaves of `load_adapter`.

    >>> lora_tree({"lora.q.kernel.a": 1, "lora.q.kernel.b": 2, "base.head.out.bias": 3})
    {'q.kernel': {'a': 1, 'b': 2}}
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        if name.startswith("lora."):
            target, _, part = name.removeprefix("lora.").rpartition(".")
            tree.setdefault(target, {})[part] = leaf
    return tree


def head_tree(flat: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The trained head within the leaves of `load_adapter`; None without one.

    >>> head_tree({"lora.q.kernel.a": 1, "base.head.out.kernel": 2, "base.head.out.bias": 3})
    {'out': {'kernel': 2, 'bias': 3}}
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        if name.startswith("base.head."):
            module, _, part = name.removeprefix("base.head.").rpartition(".")
            tree.setdefault(module, {})[part] = leaf
    return tree or None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(map(_tuple, v)) if isinstance(v, list) else v for k, v in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
