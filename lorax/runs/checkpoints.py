"""Checkpoints by Orbax: resumable training state, and small adapters.

Orbax writes a checkpoint to a temporary folder and renames it when it is complete, so a partial
write never counts as a checkpoint. The frozen base is never saved; its source is.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lorax.lora.paths import leaf_path
from lorax.runs.files import os_faults

log = logging.getLogger(__name__)
KEEP = 2


class Checkpoints:
    """The checkpoints of one trial, newest last; two are kept.

    Args:
      directory: created if missing; it may hold nothing else.
    """

    def __init__(self, directory: Path):
        self.directory, self._is_open = directory.absolute(), True
        self._manager = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Write a pytree of arrays (None allowed) and a JSON-able record of the progress."""
        with os_faults(self.directory):
            metadata = {"record": record}
            self._manager.save(step, flatten(state), custom_metadata=metadata, overwrite=True)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest readable (state, record); None without one.

        A damaged checkpoint is moved aside with a warning: an older one gives the same numbers,
        but takes longer.

        Args:
          like: a pytree of the structure and shapes that were saved.
        """
        abstract = _abstract(flatten(like))
        return self._newest(lambda step: _unflatten(self._manager.load(step, abstract), like))

    def restore_flat(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The newest readable (leaves by path, record), whatever their structure and shapes."""
        return self._newest(lambda step: jax.tree.map(np.asarray, self._manager.load(step)))

    def _newest(self, load: Callable[[int], Any]) -> tuple[Any, dict[str, Any]] | None:
        for checkpoint in reversed(self._manager.checkpoints):
            try:
                with os_faults(self.directory):
                    state = load(checkpoint.step)
                metadata = self._manager.metadata(checkpoint.step).custom_metadata
                if not metadata:  # Orbax reads a damaged record as an empty one
                    raise ValueError("it does not say where training stood")
                return state, dict(metadata["record"])
            except (FileNotFoundError, NotADirectoryError) as fault:
                self._set_aside(checkpoint.step, fault)
            except (MemoryError, OSError, jax.errors.JaxRuntimeError):
                raise  # a fault of the machine: the checkpoint may be sound
            except Exception as fault:  # any kind of damage; Orbax's errors share no base class
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
        """Release Orbax's threads, once; also raises the fault of a failed write."""
        if self._is_open:
            self._is_open = False
            with os_faults(self.directory):
                self._manager.close()


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by dotted path, on the host."""
    return {leaf_path(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _unflatten(flat: dict[str, Any], like: Any) -> Any:
    def leaf(path: tuple[Any, ...], want: Any) -> np.ndarray:
        name = leaf_path(path)
        found = np.asarray(flat[name])
        if found.shape != np.shape(want):  # Orbax loads another shape silently
            raise ValueError(f"{name} has shape {found.shape}, expected {np.shape(want)}")
        return found

    return jax.tree_util.tree_map_with_path(leaf, like)


def _abstract(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: np.empty_like(x) for name, x in flat.items()}
