"""The plugin of the packed launcher: Hydra finds launchers only in this namespace package.

Every Hydra application of an environment imports it, so lorax and JAX wait until it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn


class PackedLauncher(BasicLauncher):
    """All trials of a batch as packs, each one compiled program; see `lorax.sweep.run_sweep`."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train the packs, then let Hydra write what it writes for each job."""
        from lorax.launch.composer import trials_of
        from lorax.launch.launcher import launch_packed

        trials = trials_of(self.hydra_context, self.config, job_overrides)
        self.task_function = ended = launch_packed(trials)
        return ended.close(super().launch(job_overrides, initial_job_idx))


@dataclass
class PackedLauncherConf:
    """Options: none; see `sweep` in `lorax.config`."""

    _target_: str = "hydra_plugins.lorax_packed.PackedLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="packed", node=PackedLauncherConf)
