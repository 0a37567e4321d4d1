"""Learning rates and other hyperparameters of the optimizer, for runs in lockstep."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lorax.config import TrialConfig
from lorax.train.optimizer import Hyper
from lorax.train.schedule import lr_table


class HyperStream:
    """The optimizer's hyperparameters of K runs, by step.

    Args:
      configs: of the runs.
      total_steps: optimizer steps of each.
    """

    def __init__(self, configs: Sequence[TrialConfig], total_steps: int):
        optimizers = [config.optimizer for config in configs]
        schedules = [(o.schedule, total_steps, o.warmup_ratio) for o in optimizers]
        unlike = list(dict.fromkeys(schedules))
        self._tables = np.stack([lr_table(*schedule) for schedule in unlike]).astype(np.float64)
        self._table_of_run = np.asarray([unlike.index(schedule) for schedule in schedules])
        self._lr = np.asarray([o.lr for o in optimizers])
        self._head_lr = np.asarray([o.lr if o.head_lr is None else o.head_lr for o in optimizers])
        clips = [np.inf if o.clip_norm is None else o.clip_norm for o in optimizers]
        fixed = (
            [o.weight_decay for o in optimizers],
            clips,
            [o.b1 for o in optimizers],
            [o.b2 for o in optimizers],
            [o.eps for o in optimizers],
        )
        self._fixed = [jnp.asarray(np.asarray(values, np.float32)) for values in fixed]

    def at(self, step: int) -> Hyper:
        """The hyperparameters of a step, the first being 0: (K,) float32 each."""
        factors = self._tables[self._table_of_run, step]
        lr, head_lr = self._lr * factors, self._head_lr * factors
        return Hyper(lr.astype(np.float32), head_lr.astype(np.float32), *self._fixed)
