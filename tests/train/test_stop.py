"""SIGINT and SIGTERM: the step is saved, the command ends in one line, and goes on to the bit."""

import json
import signal
import sys

import numpy as np
import pytest

from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir
from lorax.runtime import stop
from lorax.sweep import run_packed
from lorax.train import run_trial
from tests.helpers.signals import SignalAt, lines

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]
TRAIN = {"max_steps": 60, "eval_every": 50, "log_every": 1}
DROPOUT = {"name": "tiny", "dropout": 0.1}


def trial_of(world, root, seed=0, **train):
    return world.trial(root, model=DROPOUT, train={**TRAIN, **train}, seed=seed)


def steps(folder):
    return sorted(int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit())


def outcome(trial):
    directory = trial_dir(trial)
    result = json.loads((directory / "result.json").read_text())
    flat, _, about = load_adapter(directory / "adapter")
    arrays = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
    told = {name: result[name] for name in ("status", "best", "last", "steps")}
    return (directory / "metrics.jsonl").read_bytes(), told, arrays, about


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A trial that nothing stops."""
    trial = trial_of(world, tmp_path_factory.mktemp("whole"))
    run_trial(trial)
    return outcome(trial)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_trial_has_saved_its_step_and_goes_on_to_the_bit(world, tmp_path, whole, number):
    trial = trial_of(world, tmp_path)
    handler = signal.getsignal(number)
    with SignalAt(number, trial, 5), pytest.raises(stop.Stopped) as stopped, stop.at_entry_point():
        run_trial(trial)
    assert signal.getsignal(number) is handler
    (saved,) = steps(trial_dir(trial))
    assert 5 <= saved < 50 and lines(trial) == saved  # no step is done beyond what is saved
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert str(stopped.value) == (
        f"{word} at step {saved} of 60, which is saved; the same command resumes from there"
    )
    run_trial(trial)
    assert outcome(trial) == whole


def test_a_stopped_pack_has_saved_its_step_and_goes_on_to_the_bit(world, tmp_path):
    pairs = [
        [trial_of(world, tmp_path / name, seed) for seed in (0, 1)] for name in ("cut", "whole")
    ]
    cut, uncut = pairs
    with (
        SignalAt(signal.SIGINT, cut[1], 5),
        pytest.raises(stop.Stopped, match=r"at step \d+ of 60"),
        stop.at_entry_point(),
    ):
        run_packed(cut)
    (folder,) = (tmp_path / "cut").glob("tiny/packs/*/")
    (saved,) = steps(folder)
    assert [lines(trial) for trial in cut] == [saved, saved] and saved < 50
    run_packed(cut)
    run_packed(uncut)
    assert list(map(outcome, cut)) == list(map(outcome, uncut))


def test_outside_of_a_door_signals_are_pythons(world, tmp_path):
    """The library installs nothing: not on import, and not while it trains."""
    trial, seen = trial_of(world, tmp_path, max_steps=4), []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with SignalAt(signal.SIGTERM, trial, 1):
            result = run_trial(trial)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and result["steps"] == 4


def test_a_jobs_own_handler_acts_when_the_step_is_saved(world, tmp_path, whole):
    """As submitit's of SIGUSR2 does, which leaves by SystemExit; SIGTERM it passes over."""
    trial, saved = trial_of(world, tmp_path), {}

    def requeue(number, frame):
        saved[number] = steps(trial_dir(trial))
        if number == signal.SIGUSR2:
            sys.exit(-1)

    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.signal(number, requeue) for number in numbers}
    try:
        with (
            SignalAt(signal.SIGTERM, trial, 3),
            SignalAt(signal.SIGUSR2, trial, 20),
            pytest.raises(SystemExit),
            stop.in_a_job(),
        ):
            run_trial(trial)
        assert all(signal.getsignal(number) is requeue for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (first,), (*_, second) = saved[signal.SIGTERM], saved[signal.SIGUSR2]
    assert 3 <= first < second < 50 and lines(trial) == second
    run_trial(trial)
    assert outcome(trial) == whole


def test_of_a_jobs_signals_that_wait_together_none_is_lost():
    """A preempted job of Slurm gets SIGTERM, which submitit passes over, and SIGUSR2, too."""
    acted = []
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = {n: signal.signal(n, lambda number, _: acted.append(number)) for n in numbers}
    try:
        with stop.in_a_job(), stop.training():
            for number in (*numbers, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop.is_asked() and acted == []
            stop.act("saved")
            assert acted == list(numbers) and not stop.is_asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_checkpoints_by_minutes_change_nothing_else(world, tmp_path):
    often, never = (
        world.trial(tmp_path / name, train={"checkpoint_minutes": minutes, "log_every": 1})
        for name, minutes in (("often", 1e-9), ("never", None))
    )
    for trial in (often, never):
        run_trial(trial)
    assert steps(trial_dir(often)) == [3, 4] and steps(trial_dir(never)) == [4]
    assert outcome(often) == outcome(never)


# Trains a pickled trial in forks, each with signals of its own kind at its own moment; prints how
# each ended and what it said. The first moment is before training, the second while the first step
# is compiled, the third while a checkpoint is written.
FORKS = """
import json, os, pickle, signal, sys, threading, time
from pathlib import Path
from lorax.launch import entry_point
from lorax.sweep.run_serial import run_and_log

root = Path(sys.argv[1])

def watch(word, act):
    def hook(event, arguments):
        nonlocal act
        if act and event == "open" and word in str(arguments[0]):
            act, now = None, act
            now()
    sys.addaudithook(hook)

def kill(*numbers, after=0.0, held=0.0, apart=0.3):  # two that wait at a time are one
    def act():
        time.sleep(after)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(apart)
        time.sleep(held)  # what the moment is in does not go on
    return act

def kill_later(*numbers, **options):
    return threading.Thread(target=kill(*numbers, **options), daemon=True).start

BOTH = signal.SIGTERM, signal.SIGTERM  # as of a program that signals a process and its group

MOMENTS = {
    "reading": ("base/config.json", kill(signal.SIGINT)),
    "compiling": ("config.json.partial", kill_later(*BOTH, after=0.3, apart=0.01)),
    "twice": ("config.json.partial", kill_later(signal.SIGINT, signal.SIGINT, after=0.3)),
    "saving": ("4.orbax-checkpoint-tmp", kill(signal.SIGINT, signal.SIGINT, held=60)),
}
ends = {}
for name, moment in MOMENTS.items():
    trial = pickle.loads((root / name).read_bytes())
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(root / f"{name}.err", os.O_WRONLY | os.O_CREAT), 2)
        watch(*moment)
        entry_point(lambda: run_and_log(trial))
        os._exit(0)
    ends[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(ends))
"""


def test_a_command_ends_in_one_line_and_the_signals_status(world, tmp_path):
    import pickle

    trials = {
        name: trial_of(world, tmp_path / f"out-{name}", checkpoint_every=2)
        for name in ("reading", "compiling", "twice", "saving")
    }
    for name, trial in trials.items():
        (tmp_path / name).write_bytes(pickle.dumps(trial))
    process = world.start("-c", FORKS, tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out) == {"reading": 130, "compiling": 143, "twice": 130, "saving": 130}
    said = {name: (tmp_path / f"{name}.err").read_text().splitlines() for name in trials}
    assert said["reading"] == ["interrupted before the first step of training: nothing is lost"]
    assert said["compiling"] == ["terminated before the first step of training: nothing is lost"]
    assert said["twice"] in ([], said["reading"])  # at once, or as one
    assert said["saving"] == []
    assert lines(trials["compiling"]) == 0
    assert steps(trial_dir(trials["saving"])) == [2]  # the one before is as it was
