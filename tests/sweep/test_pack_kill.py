"""SIGKILL of a packed sweep at many kinds of moments, and the same command again: the same bits."""

import json
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from lorax.config import HalvingConfig
from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir

pytestmark = pytest.mark.production

TRAIN = {"max_steps": 12, "eval_every": 4, "checkpoint_every": 3, "log_every": 1}
# With dropout in the one kind only: its programs take three times as long to compile.
DROPOUT = {"plain": 0.1, "halving": 0.0}
COSTS = {
    "adapter_bytes",
    "began",
    "command",
    "compile_seconds",
    "ended",
    "environment",
    "flops_per_step",
    "lanes",
    "peak_device_bytes",
    "peak_rss_bytes",
    "seconds_per_step",
    "seconds_total",
    "step_memory_bytes",
}

# Trains pickled trials over and over: each time in a fork, which kills itself just before the n-th
# file operation that a pattern fits, and at last to the end. Prints how each ended, and what then
# had a result.
SWEEPS = """
import json, os, pickle, re, signal, sys
from pathlib import Path
from lorax.launch import entry_point
from lorax.sweep import run_packed

root, moments = Path(sys.argv[1]), json.loads(sys.argv[2])
trials = pickle.loads((root / "trials").read_bytes())

def watch(pattern, left):
    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "shutil.rmtree"):
            left -= bool(re.search(pattern, " ".join(map(str, (event, *arguments, "")))))
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

resumptions = []
for moment in [*moments, None]:
    pid = os.fork()
    if pid == 0:
        if moment:
            watch(*moment)
        entry_point(lambda: run_packed(trials))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    times = {str(path): path.stat().st_mtime_ns for path in root.glob("tiny/*/result.json")}
    resumptions.append([status, times])
print(json.dumps(resumptions))
"""
MOMENTS = {
    "plain": [
        (r"rename .*/checkpoints/3 ", 1),  # while the first checkpoint is written
        (r"open .*packed.json", 3),  # it is there; not all trials know of it
        (r"rename .*lr1e-12\S*/result.json ", 1),  # the early one has an adapter, and no result
        (r"open .*/checkpoints/9.orbax-checkpoint-tmp", 1),  # another one begins
        (r"rename .*/result.json ", 2),  # some results are there
        (r"rename .*/pack.json ", 2),  # all are; the pack is not over
    ],
    "halving": [
        (r"rename .*/result.json ", 2),  # one has diverged; the first cut has no result
        (r"rename .*/result.json ", 2),  # the second
        (r"rename .*tiny/sst2\S*/checkpoints/4 ", 1),  # it has one, and no checkpoint of its own
        (r"rename .*/packs/\S*/checkpoints/4 ", 1),  # the pack has shrunk; no checkpoint says so
        (r"rename .*/packs/\S*/checkpoints/8 ", 1),  # again
        (r"rmtree .*/packs/\S*/checkpoints ", 1),  # the pack is over
    ],
}


def trials_of(world, root, kind):
    """Unlike ranks, targets and seeds; one that diverges at step 2; one that ends at step 8."""
    halving = HalvingConfig(after=4 if kind == "halving" else None)

    def trial(rank=2, targets="qv", lr=0.01, seed=0, **train):
        return world.trial(
            root,
            lora={"rank": rank, "targets": targets, "dropout": DROPOUT[kind]},
            model={"name": "tiny", "dropout": DROPOUT[kind]},
            optimizer={"lr": lr, "warmup_ratio": 0.0},
            train={**TRAIN, **train},
            sweep={"name": "tiny", "halving": halving},
            seed=seed,
        )

    others = [trial(1), trial(3), trial(2, ["q", "v"], seed=1), trial(2, seed=2)]
    return [*others, trial(2, "q", 1e-12, early_stopping=1), trial(lr=1e30)]


def run(world, trials, moments):
    """Train them, killed at each of the moments in turn, to the end: see `SWEEPS`."""
    root = trial_dir(trials[0]).parents[1]
    (root / "trials").write_bytes(pickle.dumps(trials))
    process = world.start("-c", SWEEPS, root, json.dumps(moments))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def outcome(directory):
    """All that a kill must not change."""
    result = json.loads((directory / "result.json").read_text())
    flat, spec, about = load_adapter(directory / "adapter")
    arrays = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
    own = {name: value for name, value in result.items() if name not in COSTS}
    return (directory / "metrics.jsonl").read_bytes(), own, arrays, spec, about


def outcomes(root):
    """Of each trial, by its name."""
    return {path.parent.name: outcome(path.parent) for path in root.glob("tiny/*/result.json")}


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.glob("tiny/*/result.json")}


def left_over(root):
    """What only a sweep that goes on needs."""
    patterns = ("**/*.partial", "**/*tmp*", "tiny/*/packed.json", "tiny/packs/*/checkpoints")
    return [path for pattern in patterns for path in root.glob(pattern)]


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """By kind: a sweep that ran through, and one killed many times in a row, to the end."""

    def chain(kind):
        whole, cut = (tmp_path_factory.mktemp(f"{kind}-{name}") for name in ("whole", "cut"))
        ((code, _),), said = run(world, trials_of(world, whole, kind), [])
        assert code == 0, said
        resumptions, said = run(world, trials_of(world, cut, kind), MOMENTS[kind])
        ends = [code for code, _ in resumptions]
        assert ends == [-signal.SIGKILL] * len(MOMENTS[kind]) + [0], said
        return whole, cut, [times for _, times in resumptions]

    with ThreadPoolExecutor() as pool:
        return dict(zip(MOMENTS, pool.map(chain, MOMENTS), strict=True))


@pytest.mark.parametrize("kind", MOMENTS)
def test_killed_many_times_in_a_row_it_ends_with_the_same_bits(killed, kind):
    whole, cut = map(outcomes, killed[kind][:2])
    assert len(whole) == 6
    ends = {(own["status"], own["steps"]) for _, own, *_ in whole.values()}
    if kind == "plain":
        assert ends == {("finished", 12), ("finished", 8), ("diverged", 2)}
    else:
        assert {("cut", 4), ("diverged", 2)} < ends and len({end for end, _ in ends}) == 3
    assert cut.keys() == whole.keys()
    for name, expected in whole.items():
        assert cut[name] == expected, name


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_result_is_written_once(killed, kind):
    *resumptions, last = killed[kind][2]
    assert all(times.items() <= last.items() for times in resumptions)
    assert len({len(times) for times in resumptions}) >= 3  # kills fell between results


@pytest.mark.parametrize("kind", MOMENTS)
def test_nothing_is_left_of_the_pack(killed, kind):
    whole, cut, _ = killed[kind]
    assert left_over(whole) == left_over(cut) == []


# Of the command itself: two of its six trials diverge, two stop early, and the pack shrinks.
COMMAND = [
    "-m",
    "hydra/launcher=packed",
    "lora.rank=1,3",
    "optimizer.lr=0.01,1e30,1e-12",
    "seed=${lora.rank}",
    "optimizer.warmup_ratio=0",
    "train.early_stopping=3",
    "train.max_steps=20",
    "train.eval_every=4",
    "train.checkpoint_every=3",
    "train.log_every=1",
]


def steps(root):
    names = (path.name for path in root.glob("tiny/packs/*/checkpoints/*"))
    return [int(name) for name in names if name.isdigit()]


POLLED = [
    steps,  # after the first checkpoint
    lambda root: 2 < len(times(root)) < 5,  # while results are written
    lambda root: 20 in steps(root) and len(times(root)) == 5,  # after the last checkpoint
]


def test_the_command_killed_from_outside_ends_with_the_same_bits(world, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = world.finetune(*world.overrides(whole, *COMMAND))
    assert done.returncode == 0, done.stderr
    command = "-m", "experiments.finetune", *world.overrides(cut, *COMMAND)
    for is_time in POLLED:
        world.kill_when(world.start(*command), partial(is_time, cut))
    done = world.finetune(*world.overrides(cut, *COMMAND))
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumes from step 20 of 20" in done.stdout
    assert done.stdout.count(": accuracy ") == 4 and done.stdout.count(": diverged, ") == 2
    assert outcomes(cut) == outcomes(whole)
    assert left_over(cut) == []
