"""Orbax, for what a trial needs: resumable training state, and small adapters.

Orbax writes a checkpoint beside its place and renames it when it is whole, so that one cut
short is never taken for a checkpoint. The frozen base is never saved: its source is.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lorax.errors import LoraxError
from lorax.lora import LoraSpec
from lorax.lora.paths import leaf_path

log = logging.getLogger(__name__)
KEEP = 2


class Checkpoints:
    """The checkpoints of one trial, newest last; two are kept.

    Args:
      directory: made when missing; nothing else may live in it.
    """

    def __init__(self, directory: Path):
        self.directory, self._is_open = directory.absolute(), True
        self._manager = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Write a pytree of arrays (None allowed) and a JSON-able record of where it stands."""
        with _os_faults(self.directory):
            metadata = {"record": record}
            self._manager.save(step, _flatten(state), custom_metadata=metadata, overwrite=True)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest readable (state, record); None when there is none.

        A damaged checkpoint is set aside with a warning: an older one leads to the same
        numbers, later.

        Args:
          like: a pytree of the structure and shapes that were saved.
        """
        abstract = _abstract(_flatten(like))
        return self._newest(lambda step: _unflatten(self._manager.load(step, abstract), like))

    def restore_flat(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest readable (leaves by path, record), whatever their structure and shapes."""
        return self._newest(lambda step: jax.tree.map(np.asarray, self._manager.load(step)))

    def _newest(self, load: Callable[[int], Any]) -> tuple[Any, dict[str, Any]] | None:
        for checkpoint in reversed(self._manager.checkpoints):
            try:
                with _os_faults(self.directory):
                    state = load(checkpoint.step)
                metadata = self._manager.metadata(checkpoint.step).custom_metadata
                if not metadata:  # Orbax takes a damaged record for an empty one
                    raise ValueError("it does not say where training stood")
                return state, dict(metadata["record"])
            except (FileNotFoundError, NotADirectoryError) as fault:
                self._set_aside(checkpoint.step, fault)
            except (MemoryError, OSError, jax.errors.JaxRuntimeError):
                raise  # the machine's fault: the checkpoint may well be whole
            except Exception as fault:  # any kind of damage, and Orbax has no common base class
                self._set_aside(checkpoint.step, fault)
        return None

    def _set_aside(self, step: int, fault: Exception) -> None:
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        place = self.directory.with_name(f"damaged-checkpoint-{step}")
        shutil.rmtree(place, ignore_errors=True)
        (self.directory / str(step)).rename(place)
        self._manager.reload()
        log.warning("checkpoint is damaged, set aside as %s: %s", place, reason)

    def close(self) -> None:
        """Release Orbax's threads, once; a write that failed is raised here, too."""
        if self._is_open:
            self._is_open = False
            with _os_faults(self.directory):
                self._manager.close()


def save_adapter(path: Path, trainable: Any, spec: LoraSpec | None, about: dict[str, Any]) -> int:
    """Write what a trial trained, and nothing of the frozen base.

    Args:
      path: a folder, replaced when present.
      trainable: the trained side of `lorax.split`.
      spec: rank, alpha, targets and all; None when no adapter was trained.
      about: JSON-able facts, such as the base's source.

    Returns:
      Bytes on disk.
    """
    record = {**about, "spec": dataclasses.asdict(spec) if spec else None}
    with _os_faults(path):
        ocp.save(path.absolute(), _flatten(trainable), overwrite=True, custom_metadata=record)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def load_adapter(path: Path) -> tuple[dict[str, jax.Array], LoraSpec | None, dict[str, Any]]:
    """(trained leaves by path, spec, facts) of `save_adapter`.

    The leaves of targets are `lora.<target>.a` and `.b`; `lora_tree` puts them together.

    Raises:
      LoraxError: no adapter there, or a damaged one.
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
    """The trained head within the leaves of `load_adapter`; None: there is none.

    >>> head_tree({"lora.q.kernel.a": 1, "base.head.out.kernel": 2, "base.head.out.bias": 3})
    {'out': {'kernel': 2, 'bias': 3}}
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        if name.startswith("base.head."):
            module, _, part = name.removeprefix("base.head.").rpartition(".")
            tree.setdefault(module, {})[part] = leaf
    return tree or None


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or absent, whenever the process dies or the power goes."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def sync_all(path: Path) -> None:
    """Have a file, or a folder and all that it holds, reach the disk."""
    for held in path.rglob("*"):
        _sync(held)
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    if os.name == "nt":  # Windows opens no folders, and files for writing only
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _os_faults(path: Path) -> Iterator[None]:
    """TensorStore reports a full disk as a ValueError of many lines: an OSError again."""
    try:
        yield
    except ValueError as fault:
        code = re.search(r"os_error_code='(\d+)'", str(fault))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from fault


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    return {leaf_path(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _unflatten(flat: dict[str, Any], like: Any) -> Any:
    def leaf(path: tuple[Any, ...], want: Any) -> np.ndarray:
        name = leaf_path(path)
        found = np.asarray(flat[name])
        if found.shape != np.shape(want):  # Orbax loads another shape without a word
            raise ValueError(f"{name} has shape {found.shape}, expected {np.shape(want)}")
        return found

    return jax.tree_util.tree_map_with_path(leaf, like)


def _abstract(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: np.empty_like(x) for name, x in flat.items()}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(map(_tuple, v)) if isinstance(v, list) else v for k, v in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
