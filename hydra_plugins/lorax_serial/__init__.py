"""The launcher's face: Hydra only takes launchers from this namespace package."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from lorax.sweep.launcher import SerialLauncher as _SerialLauncher


class SerialLauncher(_SerialLauncher):
    """See `lorax.sweep.launcher`."""


@dataclass
class SerialLauncherConf:
    """Options: none."""

    _target_: str = "hydra_plugins.lorax_serial.SerialLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="lorax_serial", node=SerialLauncherConf)
