"""Training one trial: loss, optimizer, the compiled step, loop, evaluation, metrics."""

from lorax.train.setup import check_trial, spec_of
from lorax.train.trial import run_trial

__all__ = ["check_trial", "run_trial", "spec_of"]
