"""`python -m experiments.memory`: the sizes are those of the arrays, and of XLA's plan."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lorax.errors import LoraxError
from lorax.sweep.cost import trial_memory
from lorax.sweep.memory_table import Memory, alternatives, memory_of, memory_table
from lorax.train.setup import prepare

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_each_kind_is_what_its_arrays_take(world):
    trial = world.trial()
    memory, counts = memory_of(trial), prepare(trial).counts
    trained = counts["adapter_params"] + counts["head_params"]
    targets = len(prepare(trial).frozen.scales)
    assert memory.base == 4 * (counts["base_params"] + targets)
    assert memory.trained == 4 * trained
    assert memory.optimizer == 2 * memory.trained + 4
    assert memory.total >= trial_memory(trial)
    full = memory_of(alternatives(trial)["full fine-tuning"])
    assert full.base == 0
    assert full.trained == 4 * (counts["base_params"] + counts["head_params"])
    assert full.total > memory.total


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's plan of a CPU")
def test_every_cheaper_setting_is_cheaper(world):
    found = {name: memory_of(trial) for name, trial in alternatives(world.trial()).items()}
    plain = found["as asked"]
    for name in ("bf16", "int8", "nf4"):
        assert found[f"with train.base_dtype={name}"].base < plain.base
    assert found["with train.remat=true"].temporary < plain.temporary
    assert found["with nf4, bf16 compute and remat"].base < found["with train.base_dtype=nf4"].base


def test_the_table_compares_with_its_first_row():
    found = {
        "all": Memory(0, 90_000_000, 180_000_000, 0, 30_000_000),
        "lora": Memory(1, 2, 3, 4, 5),
    }
    lines = memory_table(found).splitlines()
    assert "300.0" in lines[2]
    assert lines[2].split()[-2] == "1.0"
    assert float(lines[3].split()[-2]) == 20_000_000


def test_full_fine_tuning_has_nothing_to_compare_with(world):
    assert list(alternatives(world.trial(train={"mode": "full"}))) == ["full fine-tuning"]


def test_a_bad_setting_is_refused(world):
    with pytest.raises(LoraxError, match=r"train\.base_dtype='int4' is unknown"):
        memory_of(world.trial(train={"base_dtype": "int4"}))


def test_a_mesh_is_refused(world):
    trial = world.trial()
    trial.sweep.mesh.fsdp = 2
    with pytest.raises(LoraxError, match=r"on one device: leave sweep\.mesh out"):
        memory_of(trial)


def test_the_command_prints_the_table_and_faults_in_a_line(world, tmp_path):
    command = [sys.executable, "-m", "experiments.memory", *world.overrides(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("| MB")
    assert len(done.stdout.splitlines()) == 10
    done = subprocess.run(
        [*command, "lora.targets=nothing"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "nothing" in done.stderr
    assert not list(tmp_path.iterdir())
