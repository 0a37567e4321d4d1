"""Training one trial: loss, optimizer, the compiled step, loop, evaluation, metrics."""

from lorax.train.run_trial import run_trial
from lorax.train.setup import check_trial, spec_of

__all__ = ["check_trial", "run_trial", "spec_of"]
