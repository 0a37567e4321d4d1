"""Trials as jobs of submitit: on this machine, and on a Slurm of one machine (`fake_slurm`)."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from lorax.runs.trial_id import trial_dir

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
from tests.helpers import fake_slurm

pytestmark = pytest.mark.slow

FINETUNE = ("-m", "experiments.finetune")
LONG = ["lora.rank=1,2", "train.max_steps=600", "train.checkpoint_every=25", "train.eval_every=300"]


def ranks(root):
    """The ranks whose trials have a result."""
    found = [path.parent.name for path in root.glob("tiny/*/result.json")]
    return sorted(int(re.search(r"-r(\d+)-", name).group(1)) for name in found)


@pytest.fixture
def slurm(tmp_path):
    """Environment in which the fake Slurm is found."""
    folder = fake_slurm.install(tmp_path / "slurm")
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def block(world, root, rank):
    """A folder where a trial's record has to be."""
    place = trial_dir(world.trial(root, lora={"rank": rank})) / "config.json"
    place.mkdir(parents=True)
    return place


@pytest.mark.parametrize("launcher", ["packed_submitit_local", "packed_slurm"])
def test_a_job_that_fails_is_a_line_and_leaves_the_others_alone(world, tmp_path, slurm, launcher):
    blocked = block(world, tmp_path, rank=1)
    words = ["-m", "lora.rank=1,2", "sweep.max_trials=1", f"hydra/launcher={launcher}"]
    first = world.finetune(*world.overrides(tmp_path, *words), **slurm)
    assert first.returncode == 2
    assert first.stderr == (
        "error: 1 of 2 jobs failed and left 1 trial; the same command resumes them\n"
    )
    (line,) = [line for line in first.stdout.splitlines() if line.startswith("job 1 of 2")]
    assert line.startswith("job 1 of 2, 1 trial: failed, cannot write ") and "config.json" in line
    log = Path(re.search(r"log (\S+)\)$", line).group(1))
    assert "Traceback" in log.read_text()
    assert ranks(tmp_path) == [2]

    blocked.rmdir()
    again = world.finetune(*world.overrides(tmp_path, *words), **slurm)
    assert (again.returncode, again.stderr) == (0, "")
    assert "1 trial to train as 1 job" in again.stdout
    assert ranks(tmp_path) == [1, 2]


def test_options_reach_sbatch(world, tmp_path, slurm):
    options = ["partition=gpu", "gpus_per_node=1", "timeout_min=90", "array_parallelism=2"]
    options = [f"hydra.launcher.{option}" for option in [*options, "setup=[echo hello]"]]
    ended = world.finetune(
        *world.overrides(tmp_path, "-m", "lora.rank=1,2,4", "hydra/launcher=packed_slurm"),
        "sweep.max_trials=1",
        *options,
        **slurm,
        FAKE_SLURM_EXPORT="NONE",
    )
    assert ended.returncode == 0, ended.stderr
    (script,) = (tmp_path / "slurm").glob("job-*")
    text = script.read_text()
    for flag in ("partition=gpu", "gpus-per-node=1", "time=90", "array=0-2%2"):
        assert f"#SBATCH --{flag}\n" in text
    assert "\necho hello\n" in text
    assert ranks(tmp_path) == [1, 2, 4]


def signalled(world, root, number, environment):
    """Run a sweep of one pack; once it has checkpoints, its process gets a signal."""
    words = world.overrides(root, "-m", "hydra/launcher=packed_slurm", *LONG)
    process = world.start(*FINETUNE, *words, **environment)
    while process.poll() is None and not list(root.glob("tiny/packs/*/checkpoints/50")):
        time.sleep(0.05)
    lock = next(root.glob("tiny/*/lock"))
    os.kill(int(lock.read_text().split()[1]), number)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def metrics(root):
    return {path.parent.name: path.read_bytes() for path in root.glob("tiny/*/metrics.jsonl")}


def logs(root):
    return "".join(path.read_text() for path in (root / "tiny/.submitit").rglob("*log.out"))


def test_a_preempted_job_is_queued_again_and_ends_with_the_same_numbers(world, tmp_path, slurm):
    code, _, err = signalled(world, tmp_path / "cut", signal.SIGUSR2, slurm)
    assert (code, err) == (0, "")
    told = logs(tmp_path / "cut")
    assert "Requeued job" in told and re.search("resumes from step", told)
    words = world.overrides(tmp_path / "whole", "-m", "hydra/launcher=packed", *LONG)
    assert world.finetune(*words).returncode == 0
    assert len(metrics(tmp_path / "cut")) == 2
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_job_that_dies_is_a_line_and_its_trials_go_on(world, tmp_path, slurm):
    code, out, err = signalled(world, tmp_path, signal.SIGKILL, slurm)
    assert code == 2 and err.startswith("error: 1 of 1 job failed and left 2 trials")
    assert "failed, it ended without a result, state OUT_OF_MEMORY (job " in out
    words = world.overrides(tmp_path, "-m", "hydra/launcher=packed_slurm", *LONG)
    assert world.finetune(*words, **slurm).returncode == 0
    assert re.search("resumes from step", logs(tmp_path))


REFUSED = {
    "a bad trial": (["lora.rank=1,99"], "lora rank 99 is above .*trial sst2-lora-r99"),
    "several processes": (["hydra.launcher.nodes=2"], "a job is one process"),
    "an option of the wrong type": (["hydra.launcher.timeout_min=long"], "timeout_min: .*'long'"),
    "no Slurm": ([], 'cannot submit to slurm: Could not detect "srun"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_submitted_is_one_line(world, tmp_path, case):
    words, expected = REFUSED[case]
    ended = world.finetune(*world.overrides(tmp_path, "-m", "hydra/launcher=packed_slurm", *words))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert re.search(expected, line), line
    assert not ranks(tmp_path)
