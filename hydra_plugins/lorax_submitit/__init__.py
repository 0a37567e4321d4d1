"""The plugin of the Slurm launcher: Hydra finds launchers only in this namespace package.

Every Hydra application of an environment imports it, so lorax, JAX and submitit wait until it is
used. Options are those of hydra-submitit-launcher, under `hydra.launcher`.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

try:
    from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
except ImportError:  # without the extra
    LocalQueueConf = SlurmQueueConf = None
# One folder per run, since on one machine submitit names jobs by process ids, which may repeat.
# Not one per job (%j): submitit creates it only after sbatch, and a job may start earlier.
FOLDER = "${hydra.sweep.dir}/.submitit/${now:%Y-%m-%d_%H-%M-%S}"
RETRIES = 20  # after a timeout trials resume from their checkpoints


class PackedSubmititLauncher(BasicLauncher):
    """Trials as jobs of submitit, each of which trains packs; see `lorax.launch.slurm`."""

    name = cluster = ""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train the trials as jobs, then let Hydra write what it writes for each.

        Raises:
          LoraxError: the extra is not installed; or see `run_jobs`.
        """
        from lorax.errors import LoraxError
        from lorax.launch.composer import trials_of
        from lorax.launch.launcher import launch_jobs
        from lorax.launch.slurm import submit

        if SlurmQueueConf is None:
            raise LoraxError(
                f"hydra/launcher={self.name} needs an extra: pip install -e '.[slurm]'"
            )
        trials = trials_of(self.hydra_context, self.config, job_overrides)
        self.task_function = ended = launch_jobs(
            trials, lambda jobs: submit(jobs, self.cluster, self.options)
        )
        return ended.close(super().launch(job_overrides, initial_job_idx))


class PackedSlurmLauncher(PackedSubmititLauncher):
    """Jobs of Slurm."""

    name, cluster = "packed_slurm", "slurm"


class PackedLocalLauncher(PackedSubmititLauncher):
    """All jobs at once on this machine, in submitit's way: to try a sweep before Slurm."""

    name, cluster = "packed_submitit_local", "local"


def register() -> None:
    """Offer both launchers; without the extra they take any option, to say what is missing."""
    retries = {"max_num_timeout": RETRIES}  # Slurm's alone
    for launcher, known, more in (
        (PackedSlurmLauncher, SlurmQueueConf, retries),
        (PackedLocalLauncher, LocalQueueConf, {}),
    ):
        own = {"_target_": f"{__name__}.{launcher.__name__}", "submitit_folder": FOLDER, **more}
        node: Any = OmegaConf.create(own, flags={"struct": False})
        if known is not None:
            node = OmegaConf.merge(OmegaConf.structured(known), own)
        ConfigStore.instance().store(group="hydra/launcher", name=launcher.name, node=node)


register()
