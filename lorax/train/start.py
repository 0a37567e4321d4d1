"""The start of a run: a trial's first step, or its newest checkpoint."""

from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.config import TrialConfig
from lorax.runs.content import check_record
from lorax.runs.restore import Packs, Restored, restore
from lorax.runs.trial import Trial
from lorax.train.meter import Meter
from lorax.train.run import Progress
from lorax.train.setup import Setup, hyper_of, prepare
from lorax.train.step import State, init_state


class Start(NamedTuple):
    """The start of a run; `state` and `best` are arrays in the trial's own shapes."""

    setup: Setup
    state: State
    best: Any
    progress: Progress
    meter: Meter

    @property
    def like(self) -> dict[str, Any]:
        """The structure and shapes of the trial's checkpoints."""
        return {"state": self.state, "best": self.best}


def first_start(config: TrialConfig) -> Start:
    """A trial's first step."""
    setup = prepare(config)
    state = init_state(setup.trainable, hyper_of(config), setup.dropout_key)
    return Start(setup, state, jax.tree.map(np.asarray, state.trainable), Progress(), Meter())


def find_start(trial: Trial, packs: Packs | None = None) -> Start:
    """The trial's newest checkpoint, or its first step.

    Args:
      trial: checked, and locked by this process.
      packs: as in `restore`.

    Raises:
      LoraxError: the checkpoint is of other content of the trial's data or base.
    """
    start = first_start(trial.config)
    found = restore(trial, start.like, packs)
    if found is None:
        return start
    resumed = resume_from(trial, start, found)
    resumed.progress.cut = None  # a pruned trial that is opened again resumes
    return resumed


def resume_from(trial: Trial, start: Start, found: Restored) -> Start:
    """A trial's start at one of its checkpoints.

    Raises:
      LoraxError: the checkpoint is of another content of the trial's data or base.
    """
    check_record(trial, found.record, start.setup.content)
    return Start(
        start.setup,
        found.arrays["state"],
        jax.tree.map(np.asarray, found.arrays["best"]),
        Progress(**found.record["progress"]),
        Meter.restore(found.record["costs"]),
    )
