"""Many trials: one after another, or in packs that share one compiled program."""

from lorax.sweep.plan_table import show_plan_if_asked
from lorax.sweep.run_serial import check_trials, run_trials
from lorax.sweep.run_sweep import run_packed

__all__ = ["check_trials", "run_packed", "run_trials", "show_plan_if_asked"]
