"""Trials with damaged files on disk: the sweep leaves them out and trains the others."""

import logging
from collections.abc import Sequence

from lorax.errors import LoraxError
from lorax.runs.results import read_result
from lorax.runs.trackers import read_jsonl
from lorax.runs.trial import Trial
from lorax.sweep.words import counted

log = logging.getLogger(__name__)


def without_damaged(trials: Sequence[Trial]) -> tuple[list[Trial], dict[Trial, LoraxError]]:
    """The trials whose files are sound or do not exist yet, and the faults of the others.

    A trial that resumes from a checkpoint needs sound records. The faults are logged, so that the
    user can repair the trials while the others train.
    """
    sound, damaged = [], {}
    for trial in trials:
        try:
            if read_result(trial.directory) is None and trial.has_started:
                read_jsonl(trial.metrics)
            sound.append(trial)
        except LoraxError as fault:
            log.warning("left out: %s", fault)
            damaged[trial] = fault
    return sound, damaged


def left_out(damaged: dict[Trial, LoraxError]) -> LoraxError:
    """One fault for all trials that a sweep has left out because their results are damaged."""
    first, *others = damaged.values()
    verb = "is" if len(others) == 1 else "are"
    more = f"; so {verb} {counted(len(others), 'other result')} of this sweep" if others else ""
    return LoraxError(f"{first}{more}")
