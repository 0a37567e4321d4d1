"""The plugin of the Ray launcher: Hydra finds launchers only in this namespace package.

Every Hydra application of an environment imports it, so lorax, JAX and Ray wait until it is used.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf


class PackedRayLauncher(BasicLauncher):
    """Trials as tasks of Ray, each of which trains packs; see `lorax.launch.ray_jobs`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train the trials as tasks, then let Hydra write what it writes for each.

        Raises:
          LoraxError: the extra is not installed; or see `connect` and `run_jobs`.
        """
        from lorax.errors import LoraxError
        from lorax.launch.composer import trials_of
        from lorax.launch.launcher import launch_jobs
        from lorax.launch.ray_jobs import connect, submit

        if importlib.util.find_spec("ray") is None:
            raise LoraxError("hydra/launcher=packed_ray needs an extra: pip install -e '.[ray]'")
        connect(self.options)
        trials = trials_of(self.hydra_context, self.config, job_overrides)
        self.task_function = ended = launch_jobs(trials, lambda jobs: submit(jobs, self.options))
        return ended.close(super().launch(job_overrides, initial_job_idx))


@dataclass
class PackedRayConf:
    """Options.

    Attributes:
      address: of a running cluster, or `auto`; None starts Ray on this machine.
      num_cpus: cores a task.
      num_gpus: GPUs a task; a fraction shares one, and then needs XLA_PYTHON_CLIENT_MEM_FRACTION.
      resources: others a task, such as {TPU: 4}.
      max_retries: how often a task restarts if its process dies; it resumes from checkpoints.
      init: more arguments of `ray.init`, such as {runtime_env: {env_vars: {...}}}.
    """

    _target_: str = f"{__name__}.PackedRayLauncher"
    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    resources: dict[str, float] = field(default_factory=dict)
    max_retries: int = 2
    init: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/launcher", name="packed_ray", node=PackedRayConf)
