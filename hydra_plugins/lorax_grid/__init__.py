"""The plugin of the grid sweeper: Hydra finds sweepers only in this namespace package.

Every Hydra application of an environment imports it, so lorax and JAX wait until it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper, which composes faster; see `lorax.launch.composer`."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Share one composer with the launcher."""
        from lorax.launch.composer import share_composer

        super().setup(
            hydra_context=share_composer(hydra_context),
            task_function=task_function,
            config=config,
        )

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose each trial of a batch, which the launcher then finds composed."""
        from lorax.launch.composer import trials_of

        trials_of(self.hydra_context, self.config, batch)


@dataclass
class GridSweeperConf(BasicSweeperConf):
    """Options: those of Hydra's basic sweeper."""

    _target_: str = "hydra_plugins.lorax_grid.GridSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="lorax_grid", node=GridSweeperConf)
