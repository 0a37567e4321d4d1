"""Trials as tasks of a Ray on this machine."""

import pytest

from lorax.runs.trial_id import trial_dir

pytest.importorskip("ray", reason="needs the extra ray")


def finetune(world, root, *words):
    """A sweep by Ray, in two tasks side by side."""
    launcher = ["-m", "hydra/launcher=packed_ray", "+hydra.launcher.init.num_cpus=2", *words]
    return world.finetune(*world.overrides(root, "lora.rank=1,2", *launcher))


def test_tasks_train_packs_and_the_same_again_trains_nothing(world, tmp_path):
    ended = finetune(world, tmp_path, "seed=0,1", "sweep.max_trials=2")
    assert ended.returncode == 0, ended.stderr
    assert "4 trials to train as 2 jobs" in ended.stdout
    assert len(list(tmp_path.glob("tiny/*/result.json"))) == 4
    again = finetune(world, tmp_path, "seed=0,1", "sweep.max_trials=2")
    assert again.returncode == 0
    assert "to train" not in again.stdout
    assert again.stdout.count("trained parameters") == 4


def test_a_failed_task_is_a_line_and_leaves_the_other_alone(world, tmp_path):
    blocked = trial_dir(world.trial(tmp_path, lora={"rank": 1})) / "config.json"
    blocked.mkdir(parents=True)
    ended = finetune(world, tmp_path, "sweep.max_trials=1")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: 1 of 2 jobs failed and left 1 trial")
    (line,) = [line for line in ended.stdout.splitlines() if "failed" in line]
    assert line.startswith("job 1 of 2, 1 trial: failed, cannot write ") and "config.json" in line
    assert len(list(tmp_path.glob("tiny/*/result.json"))) == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hydra.launcher.num_gpus=64", "a task asks for 64 GPU, but Ray finds "),
        ("hydra.launcher.address=127.0.0.1:9", "no Ray at 127.0.0.1:9: Connection refused"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(world, tmp_path, word, expected):
    ended = finetune(world, tmp_path, word)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {expected}")
