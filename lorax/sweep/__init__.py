"""Many trials: from Hydra's overrides to a directory of results."""

from lorax.sweep.cli import (
    at_the_door,
    compose_trial,
    config_of,
    hydra_main,
    own_arguments,
    register,
    run_command,
)
from lorax.sweep.packed import run_packed
from lorax.sweep.plan_table import show_plan_if_asked
from lorax.sweep.serial import check_trials, run_trials

__all__ = [
    "at_the_door",
    "check_trials",
    "compose_trial",
    "config_of",
    "hydra_main",
    "own_arguments",
    "register",
    "run_command",
    "run_packed",
    "run_trials",
    "show_plan_if_asked",
]
