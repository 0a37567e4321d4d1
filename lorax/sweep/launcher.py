"""Hydra's basic launcher, with every trial checked before the first one trains."""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn

from lorax.sweep.cli import config_of
from lorax.sweep.serial import check_trials, sweep_bar


class SerialLauncher(BasicLauncher):
    """Runs a sweep's trials one after another in this process, under a progress bar."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Compose and check all, then run all.

        Raises:
          LoraxError: a trial that cannot run; nothing has been trained then.
        """
        check_trials([config_of(self._compose(overrides)) for overrides in job_overrides])
        returns: list[JobReturn] = []
        with sweep_bar(job_overrides) as bar:
            for n, overrides in enumerate(bar):
                returns += super().launch([overrides], initial_job_idx + n)
        return returns

    def _compose(self, overrides: Sequence[str]) -> Any:
        assert self.hydra_context is not None and self.config is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
