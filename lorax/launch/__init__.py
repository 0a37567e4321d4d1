"""Commands: trials from Hydra overrides, launchers behind the plugins, jobs of clusters."""

from lorax.launch.application import (
    compose_trial,
    config_of,
    entry_point,
    hydra_main,
    own_arguments,
    register,
    run_command,
)

__all__ = [
    "compose_trial",
    "config_of",
    "entry_point",
    "hydra_main",
    "own_arguments",
    "register",
    "run_command",
]
