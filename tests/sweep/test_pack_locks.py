"""Several processes on one packed sweep: no trial is trained twice, and none is left."""

import collections
import json
import signal
import subprocess
import sys
import time

import pytest

from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_packed

pytestmark = pytest.mark.slow

GRID = ["-m", "hydra/launcher=packed", "train.log_every=1", "train.eval_every=5"]

# The command; notes in a file which trials it begins and ends.
COMMAND = """
import os, runpy, sys
notes = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(("metrics.jsonl", "result.json")):
        os.write(notes, f"{arguments[1]}\\n".encode())

sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_module("experiments.finetune", run_name="__main__")
"""
# Holds a trial until another one has a result, and dies of it.
HOLDER = """
import fcntl, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
file = (folder / "lock").open("w")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
print("held", flush=True)
while not list(folder.parent.glob("*/result.json")):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def start(world, root, *overrides):
    return world.start("-c", COMMAND, root / "notes", *world.overrides(root, *GRID, *overrides))


def end(process, count):
    """What a process said that ended well and told of all trials."""
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.count(": accuracy ") == count
    return out


def notes(root):
    """How often each of the trials' files was begun, over all processes."""
    return collections.Counter((root / "notes").read_text().splitlines())


def steps(root):
    """Of each trial, the steps whose loss it has recorded."""
    return [
        [r["step"] for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == "train"]
        for path in root.glob("tiny/*/metrics.jsonl")
    ]


def wait_for(root, pattern, process):
    """The first file of that name."""
    while process.poll() is None:
        if found := list(root.glob(pattern)):
            return found[0]
        time.sleep(0.001)
    pytest.fail(f"ended before there was {pattern}: {process.communicate()}")


@pytest.mark.parametrize("most", [64, 2])
def test_two_at_once_train_each_trial_once(world, tmp_path, most):
    grid = ["lora.rank=1,2", "seed=0,1", "train.max_steps=10", f"sweep.max_trials={most}"]
    for process in [start(world, tmp_path, *grid) for _ in range(2)]:
        end(process, 4)
    assert steps(tmp_path) == [list(range(1, 11))] * 4
    assert len(notes(tmp_path)) == 8 and set(notes(tmp_path).values()) == {1}
    assert len(list(tmp_path.glob("tiny/packs/*/pack.json"))) == (1 if most == 64 else 2)


def test_when_one_of_two_dies_the_other_takes_over(world, tmp_path):
    grid = ["lora.rank=1,2", "seed=0,1,2", "train.max_steps=30", "sweep.max_trials=2"]
    processes = [start(world, tmp_path, *grid) for _ in range(2)]
    pack = wait_for(tmp_path, "tiny/packs/*/checkpoints/5", processes[0]).parents[1]
    holder = (pack / "lock").read_text().split()[1]
    first, second = sorted(processes, key=lambda process: str(process.pid) != holder)
    assert str(first.pid) == holder
    first.kill()
    first.communicate()
    assert not json.loads((pack / "pack.json").read_text()).get("is_over")
    end(second, 6)
    assert steps(tmp_path) == [list(range(1, 31))] * 6
    results = {name: n for name, n in notes(tmp_path).items() if name.endswith("result.json")}
    assert len(results) == 6 and set(results.values()) == {1}


def test_a_held_pack_is_waited_for_and_its_trials_are_refused_alone(world, tmp_path):
    grid = ["lora.rank=1,2", "train.max_steps=25"]
    first = start(world, tmp_path, *grid)
    wait_for(tmp_path, "tiny/packs/*/checkpoints/5", first)
    first.send_signal(signal.SIGSTOP)
    try:
        second = start(world, tmp_path, *grid)
        alone = world.finetune(
            *world.overrides(tmp_path, *GRID, "train.max_steps=25", "hydra/launcher=lorax_serial")
        )
        while "waiting for it" not in (line := second.stdout.readline()):
            assert second.poll() is None, second.communicate()
    finally:
        first.kill()
        first.communicate()
    assert line == "another process trains 2 of the trials; waiting for it\n"
    (refusal,) = alone.stderr.splitlines()
    assert alone.returncode == 2
    assert refusal.startswith(f"error: {tmp_path}/tiny/sst2-lora-r2-")
    assert f"is being trained by another process (process {first.pid} on " in refusal
    assert refusal.endswith("); wait, or stop it")
    assert "resumes from step" in end(second, 2)
    assert steps(tmp_path) == [list(range(1, 26))] * 2


def test_a_trial_that_another_holds_is_taken_over_when_that_one_dies(world, tmp_path):
    trials = [world.trial(tmp_path, seed=n) for n in range(4)]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, trial_dir(trials[1])], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    results = run_packed(trials)
    assert holder.wait() == -signal.SIGKILL and holder.stdout.close() is None
    assert [(r["status"], r["lanes"]) for r in results] == [
        ("finished", 3),
        ("finished", 1),
        ("finished", 3),
        ("finished", 3),
    ]
