"""Without an extra its launchers are still there, to say what is missing."""

import pytest

WITHOUT = """
import sys
sys.modules["hydra_plugins.hydra_submitit_launcher.config"] = None
sys.modules["ray"] = None
from experiments.finetune import finetune
from lorax.launch import hydra_main
hydra_main(finetune, "finetune")
"""


@pytest.mark.parametrize(
    ("launcher", "option", "extra"),
    [("packed_slurm", "partition=gpu", "slurm"), ("packed_ray", "num_gpus=1", "ray")],
)
def test_a_missing_extra_is_one_line(world, tmp_path, launcher, option, extra):
    words = world.overrides(tmp_path, "-m", f"hydra/launcher={launcher}")
    process = world.start("-c", WITHOUT, *words, f"hydra.launcher.{option}")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    line = err.splitlines()[-1]  # Hydra warns of a plugin that is there and cannot be imported
    assert line == f"error: hydra/launcher={launcher} needs an extra: pip install -e '.[{extra}]'"
