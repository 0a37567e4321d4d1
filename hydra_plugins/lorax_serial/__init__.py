"""The plugin of the serial launcher: Hydra finds launchers only in this namespace package.

Every Hydra application of an environment imports it, so lorax and JAX wait until it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn


class SerialLauncher(BasicLauncher):
    """Trials one after another in this process; see `lorax.launch.launcher`."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check all trials, then run them under a progress bar."""
        from lorax.launch.composer import trials_of
        from lorax.launch.launcher import launch

        trials = trials_of(self.hydra_context, self.config, job_overrides)
        return launch(trials, super().launch, job_overrides, initial_job_idx)


@dataclass
class SerialLauncherConf:
    """Options: none."""

    _target_: str = "hydra_plugins.lorax_serial.SerialLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="lorax_serial", node=SerialLauncherConf)
