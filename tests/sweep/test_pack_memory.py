"""A pack that runs out of memory goes on with less at once, from where it stood."""

import json
import pickle
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_packed
from lorax.sweep.pack import Pack
from lorax.sweep.run_pack import is_out_of_memory, smaller_packs
from lorax.train.batched_engine import BatchedEngine
from lorax.train.single_engine import SingleEngine
from tests.helpers.world import of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


# Trains pickled trials; once the first checkpoint is written, only so many GiB more may be taken:
# too few for a step, and enough for all else, since LLVM ends a process that it has no memory in.
LIMITED = """
import logging, pickle, re, resource, sys
from pathlib import Path
from lorax.launch import entry_point
from lorax.sweep import run_packed

root, room = Path(sys.argv[1]), int(float(sys.argv[2]) * 2**30)

def watch(event, arguments):
    if event == "os.rename" and re.search("packs/.*/checkpoints/1$", str(arguments[1])):
        status = Path("/proc/self/status").read_text()
        taken = 1024 * int(re.search(r"VmData:\\s+(\\d+)", status).group(1))
        resource.setrlimit(resource.RLIMIT_DATA, (taken + room, resource.RLIM_INFINITY))

sys.addaudithook(watch)
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO, force=True)
entry_point(lambda: run_packed(pickle.loads((root / "trials").read_bytes())))
"""
LARGE = {"batch_size": 3600, "max_steps": 2, "eval_every": 1, "log_every": 1}


def large_trials(world, root):
    """Four, all of them side by side: a step takes 2.5 GiB; 1.3 for two, 0.6 for one alone."""
    header, *lines = (world.data_dir / "SST-2" / "train.tsv").read_text().splitlines()
    folder = root / "data" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("\n".join([header, *(24 * lines)]) + "\n")
    shutil.copy(world.data_dir / "SST-2" / "dev.tsv", folder)
    trials = [
        world.trial(root, lora={"rank": n}, train=LARGE, sweep={"lanes": 4}) for n in (1, 2, 3, 4)
    ]
    for trial in trials:
        trial.task.data_dir = str(root / "data")
    return trials


def small_trials(world, root, **sweep):
    """Five, of which the last one diverges at step 2."""
    train = {"max_steps": 9, "eval_every": 4, "log_every": 1}
    rates = [0.01, 0.02, 0.01, 0.005, 1e30]
    return [
        world.trial(
            root,
            train=train,
            optimizer={"lr": rate, "warmup_ratio": 0.0},
            sweep=sweep,
            seed=n,
        )
        for n, rate in enumerate(rates)
    ]


def run_limited(world, trials, room):
    root = trial_dir(trials[0]).parents[1]
    root.mkdir(parents=True, exist_ok=True)
    (root / "trials").write_bytes(pickle.dumps(trials))
    # The allocator as it is: memory that was kept before the limit could be used below it.
    process = world.start("-c", LIMITED, root, room, MALLOC_ARENA_MAX="8")
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(trial):
    lines = (trial_dir(trial) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_numbers(trials, expected):
    for trial, other in zip(trials, expected, strict=True):
        for found, wanted in zip(records(trial), records(other), strict=True):
            losses = [record.pop("loss") or 0.0 for record in (found, wanted)]
            assert found == wanted
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def roomy(world, tmp_path_factory):
    """The large trials with all the memory there is."""
    trials = large_trials(world, tmp_path_factory.mktemp("roomy"))
    run_packed(trials)
    return trials


@pytest.mark.production  # gigabytes, which level 0 computes slowly
def test_it_goes_on_with_fewer_side_by_side(world, tmp_path, roomy):
    trials = large_trials(world, tmp_path)
    code, out, err = run_limited(world, trials, 1.9)
    assert (code, err) == (0, "")
    name = Pack(of(trials), 0).name
    assert [line for line in out.splitlines() if line.startswith("pack")] == [
        f"pack {name}: 4 trials, 2 steps; compiling",
        f"pack {name} ran out of memory with 4 trials side by side: continuing with 2 side by side",
        f"pack {name} resumes from step 1 of 2; compiling",
    ]
    assert_same_numbers(trials, roomy)
    record = json.loads((tmp_path / "tiny" / "packs" / name / "pack.json").read_text())
    assert record["lanes"] == 2 and record["is_over"]
    assert not list(tmp_path.glob("tiny/packs/*/checkpoints"))


@pytest.mark.production  # gigabytes, which level 0 computes slowly
def test_where_not_even_one_fits_it_is_one_line_and_nothing_is_lost(world, tmp_path, roomy):
    trials = large_trials(world, tmp_path)
    code, out, err = run_limited(world, trials, 0.45)
    line = err.splitlines()[-1]  # without memory, libraries may have said something before
    assert code == 2
    assert re.match(r"error: trial \S+ does not fit in memory even alone; lower train.batch", line)
    for said in ("4 trials side by side", "2 trials side by side", "packs of half the size"):
        assert said in out
    run_packed(trials)
    assert_same_numbers(trials, roomy)
    assert not list(tmp_path.glob("tiny/packs/*/checkpoints"))


def ask_for_a_petabyte():
    """A real fault of the runtime."""
    jnp.zeros(10**15).block_until_ready()


def failing_once(monkeypatch, owner, name, *, after=0):
    """Let a method of an engine run out of memory at one of its calls."""
    method, left = getattr(owner, name), after + 1

    def call(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            ask_for_a_petabyte()
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    """The small trials, undisturbed."""
    trials = small_trials(world, tmp_path_factory.mktemp("small"), lanes=1)
    run_packed(trials)
    return trials


def test_one_at_a_time_it_is_cut_into_two_packs(world, tmp_path, expected, monkeypatch, caplog):
    trials = small_trials(world, tmp_path, lanes=1)
    failing_once(monkeypatch, BatchedEngine, "step", after=6)
    results = run_packed(trials)
    assert "with 1 trial side by side: continuing with packs of half the size" in caplog.text
    assert [result["status"] for result in results] == ["finished"] * 4 + ["diverged"]
    assert_same_numbers(trials, expected)
    places = list(tmp_path.glob("tiny/packs/*/"))
    folders = {path.name.partition("-")[0]: path for path in places}
    assert folders.keys() == {"5", "2"} and len(places) == 3
    assert all(json.loads((f / "pack.json").read_text())["is_over"] for f in folders.values())
    assert not list(tmp_path.glob("tiny/packs/*/checkpoints"))


@pytest.mark.parametrize("name", ["__init__", "predict", "host_state"])
def test_memory_may_run_out_anywhere(world, tmp_path, expected, monkeypatch, name):
    trials = small_trials(world, tmp_path, lanes=5)
    monkeypatch.setattr(
        "lorax.sweep.run_sweep.plan_packs", lambda trials, **_: [Pack(tuple(trials), 1, 5)]
    )
    failing_once(monkeypatch, BatchedEngine, name)
    assert [r["status"] for r in run_packed(trials)] == ["finished"] * 4 + ["diverged"]
    assert_same_numbers(trials, expected)


def test_xla_may_tell_it_by_a_value_error(world, tmp_path, expected, monkeypatch):
    def fail():
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 2686084816 bytes.")

    trials = small_trials(world, tmp_path, lanes=5)
    monkeypatch.setattr(
        "lorax.sweep.run_sweep.plan_packs", lambda trials, **_: [Pack(tuple(trials), 1, 5)]
    )
    monkeypatch.setitem(globals(), "ask_for_a_petabyte", fail)
    failing_once(monkeypatch, BatchedEngine, "step", after=1)
    assert [r["status"] for r in run_packed(trials)] == ["finished"] * 4 + ["diverged"]
    assert_same_numbers(trials, expected)


def test_a_trial_that_is_a_pack_by_itself(world, tmp_path, monkeypatch):
    failing_once(monkeypatch, SingleEngine, "step")
    with pytest.raises(LoraxError, match="does not fit in memory even alone"):
        run_packed([world.trial(tmp_path)])


def test_what_is_smaller(world, tmp_path):
    trials = of(small_trials(world, tmp_path))
    pack = Pack(trials, 1024)
    assert smaller_packs(pack, 5) == [Pack(trials, 1024, 2)]
    assert smaller_packs(pack, 3) == [Pack(trials, 1024, 1)]
    assert smaller_packs(pack, 1) == [Pack(trials[:3], 1024, 1), Pack(trials[3:], 1024, 1)]
    for trial in trials[:3]:
        trial.directory.mkdir(parents=True)
        (trial.directory / "config.json").write_text("{}")
        ended = {"status": "diverged", "trial_id": trial.id}
        (trial.directory / "result.json").write_text(json.dumps(ended))
    assert smaller_packs(pack, 1) == [Pack(trials[3:4], 1024, 1), Pack(trials[4:], 1024, 1)]
    with pytest.raises(LoraxError, match=f"trial {pack.ids[3]} does not fit"):
        smaller_packs(Pack(trials[3:4], 1024), 1)


def fault_of(call):
    with pytest.raises(Exception) as fault:
        call()
    return fault.value


def test_what_says_that_memory_ran_out():
    def fail(x):
        raise ValueError("no such thing")

    def call_back():
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.jit(lambda x: jax.pure_callback(fail, shape, x))(1.0).block_until_ready()

    assert is_out_of_memory(fault_of(ask_for_a_petabyte))
    assert is_out_of_memory(fault_of(lambda: np.ones(10**15)))
    fault = fault_of(call_back)
    assert isinstance(fault, jax.errors.JaxRuntimeError) and not is_out_of_memory(fault)


def test_a_limit_that_no_trial_fits_is_one_line_before_training(world, tmp_path, cli):
    grid = ["-m", "hydra/launcher=packed", "lora.rank=1,2", "sweep.memory_limit_gib=0.0001"]
    (ended,) = cli([world.overrides(tmp_path, *grid)])
    (line,) = ended["err"].splitlines()
    assert ended["code"] == 2
    assert re.match(r"error: one trial of tiny needs .* GiB, above the limit of 0\.00 GiB", line)
    assert "sweep.memory_limit_gib" in line
    assert not list(tmp_path.rglob("metrics.jsonl"))
