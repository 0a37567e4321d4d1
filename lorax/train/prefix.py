"""Outputs of frozen layers, computed once because they are the same in every step.

Without dropout, the outputs of the layers below the lowest trained one depend on the example only.
In mode `head` these are all layers, and the head reads one vector per example. The outputs are
computed once per split, for all trials and epochs of a process. They are kept on the device if
they take no more than `train.prefix_cache_gib`.
"""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lorax.config import TrialConfig
from lorax.data import Encoded
from lorax.runtime.memory import GIB
from lorax.train.dataset import Dataset
from lorax.train.evaluation import batches_of
from lorax.train.indexed_batch import DeviceSplit, IndexedBatch, device_split
from lorax.train.setup import Setup
from lorax.train.step import Program, prefix_outputs

log = logging.getLogger(__name__)
_KEPT: weakref.WeakKeyDictionary[Encoded, tuple[Any, DeviceSplit]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class FrozenPrefix:
    """The frozen first layers of runs in lockstep.

    Attributes:
      program: of the runs; none of them changes its `frozen_layers`.
      setup: of one of the runs.
      config: of the same run.
      dataset: of the runs.
      mesh: where they train; None is one device.
    """

    program: Program
    setup: Setup
    config: TrialConfig
    dataset: Dataset
    mesh: Mesh | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the outputs are computed once: they fit in memory, and there is no mesh."""
        return not self.mesh and self.program.frozen_layers > 0 and self._fits

    @property
    def _fits(self) -> bool:
        splits = (self.dataset.train, *self.dataset.dev.values())
        if self.program.reads_features:
            vectors, size = sum(map(len, splits)), 4
        else:
            vectors = sum(int(split.lengths.sum()) for split in splits)
            size = 2 if self.config.train.precision == "bf16" else 4
        return vectors * self.setup.width * size <= self.config.train.prefix_cache_gib * GIB

    def split(self, encoded: Encoded) -> DeviceSplit:
        """A split on the device, with the layers' outputs if they are kept."""
        if not self.is_kept:
            return device_split(encoded, self.mesh)
        kept = _KEPT.get(encoded)
        if kept is None or kept[0] != self._key:
            _KEPT[encoded] = kept = self._key, self._computed(encoded)
        return kept[1]

    @property
    def _key(self) -> tuple[Any, ...]:
        """What the outputs depend on besides the split."""
        model, train, program = self.config.model, self.config.train, self.program
        base = self.setup.content.base, model.source, model.revision, model.pooling
        layers = program.frozen_layers, program.reads_features
        return base, layers, model.attention, train.precision, train.base_dtype

    def _computed(self, encoded: Encoded) -> DeviceSplit:
        program, setup, split = self.program, self.setup, device_split(encoded)
        count = len(encoded) if program.reads_features else int(encoded.lengths.sum())
        what = (
            "features" if program.reads_features else f"outputs of {program.frozen_layers} layers"
        )
        log.info("computing the %s of %s examples once", what, f"{len(encoded):,}")
        found = None
        size = self.config.train.eval_batch_size
        for indices, batch in batches_of(encoded, size, self.dataset, split):
            outputs = np.asarray(prefix_outputs(program, setup.trainable, setup.frozen, batch))
            outputs = outputs.reshape(-1, outputs.shape[-1])
            found = np.empty((count, setup.width), outputs.dtype) if found is None else found
            if program.reads_features:
                found[indices] = outputs[: len(indices)]
            else:
                sources, targets = _places(encoded, indices, batch)
                found[targets] = outputs[sources]
        name = "features" if program.reads_features else "hidden"
        return split._replace(**{name: jnp.asarray(found)})


def _places(
    encoded: Encoded, indices: np.ndarray, batch: IndexedBatch
) -> tuple[np.ndarray, np.ndarray]:
    """The places of a batch's tokens in its concatenated rows, and in the split."""
    lengths = encoded.lengths[indices]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    offsets = np.cumsum(encoded.lengths) - encoded.lengths
    starts = batch.starts[: len(indices)]
    return np.repeat(starts, lengths) + within, np.repeat(offsets[indices], lengths) + within
