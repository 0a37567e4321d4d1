"""A packed sweep on disks that fail: full, read-only, or with damaged and missing files."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from lorax.config import HalvingConfig
from lorax.errors import LoraxError
from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir, trial_id
from lorax.sweep import run_packed
from lorax.sweep.pack import Pack
from lorax.train import run_trial
from tests.helpers.world import of

pytestmark = pytest.mark.slow

TRAIN = {"max_steps": 12, "eval_every": 4, "checkpoint_every": 3, "log_every": 1}
KINDS = ("plain", "halving")

# Trains pickled trials in a fork each; just before a file operation that a pattern fits, the
# disk fills up, files may not grow any more, or the process is killed.
FAULTY = """
import errno, json, os, pickle, re, resource, signal, sys
from pathlib import Path
from lorax.launch import entry_point
from lorax.sweep import run_packed

def fill(path):
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as fault:
            assert fault.errno == errno.ENOSPC

FAULTS = {
    "killed": lambda root: os.kill(os.getpid(), signal.SIGKILL),
    "full": lambda root: fill(root / "filler"),
    "limited": lambda root: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1)),
}
for root, fault, pattern in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        is_near = True

        def watch(event, arguments):
            global is_near
            text = " ".join(map(str, (event, *arguments, "")))
            if is_near and event in ("open", "os.rename") and re.search(pattern, text):
                is_near = False
                FAULTS[fault](Path(root))

        sys.addaudithook(watch)
        entry_point(lambda: run_packed(pickle.loads((Path(root) / "trials").read_bytes())))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def trials_of(world, root, kind="plain"):
    """Unlike ranks, targets and seeds; one that diverges at step 2; one that ends at step 8."""
    halving = HalvingConfig(after=4 if kind == "halving" else None)

    def trial(rank=2, targets="qv", lr=0.01, seed=0, **train):
        return world.trial(
            root,
            lora={"rank": rank, "targets": targets},
            optimizer={"lr": lr, "warmup_ratio": 0.0},
            train={**TRAIN, **train},
            sweep={"name": "tiny", "halving": halving},
            seed=seed,
        )

    others = [trial(1), trial(3), trial(2, ["q", "v"], seed=1), trial(2, seed=2)]
    return [*others, trial(2, "q", 1e-12, early_stopping=1), trial(lr=1e30)]


def run_faulty(world, jobs):
    """(exit status of each (trials, fault, pattern), what they said): see `FAULTY`."""
    arguments = []
    for trials, fault, pattern in jobs:
        root = trial_dir(trials[0]).parents[1]
        (root / "trials").write_bytes(pickle.dumps(trials))
        arguments.append((str(root), fault, pattern))
    process = world.start("-c", FAULTY, json.dumps(arguments))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return [int(line) for line in out.splitlines()], err


def outcome(trial):
    """All that a fault must not change, to the bit."""
    directory = trial_dir(trial)
    result = json.loads((directory / "result.json").read_text())
    flat, spec, about = load_adapter(directory / "adapter")
    arrays = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
    ends = ("status", "reason", "cut", "best", "last", "steps", "stopped_early")
    own = {name: result[name] for name in ends}
    return (directory / "metrics.jsonl").read_bytes(), own, arrays, spec, about


def numbers(trial):
    """A trial's records: of each, what is exact, and what a program of other lanes may round."""
    lines = (trial_dir(trial) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    exact = [{k: v for k, v in r.items() if k != "loss"} for r in records]
    return exact, [r["loss"] or 0.0 for r in records]


def assert_same_numbers(trial, expected):
    exact, losses = numbers(trial)
    expected_exact, expected_losses = numbers(expected)
    assert exact == expected_exact
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """By kind: trials that no fault has met."""
    by_kind = {kind: trials_of(world, tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    for trials in by_kind.values():
        run_packed(trials)
    return by_kind


@pytest.fixture(scope="module")
def cut_short(world, tmp_path_factory):
    """By kind: the directory of a sweep that was killed while the pack had two checkpoints."""
    roots = {kind: tmp_path_factory.mktemp(f"cut-{kind}") for kind in KINDS}
    moments = {"plain": 9, "halving": 6}
    jobs = [
        (trials_of(world, roots[kind], kind), "killed", f"open .*/checkpoints/{moments[kind]}.orb")
        for kind in KINDS
    ]
    codes, err = run_faulty(world, jobs)
    assert codes == [-signal.SIGKILL] * 2, err
    return roots


@pytest.fixture
def copy(world, cut_short, tmp_path):
    """A function that gives such a sweep in a directory of its own: (trials, the pack's folder)."""

    def copied(kind="plain"):
        shutil.copytree(cut_short[kind] / "tiny", tmp_path / kind / "tiny")
        trials = trials_of(world, tmp_path / kind, kind)
        return trials, Pack(of(trials), 0).directory

    return copied


def steps(pack):
    names = (path.name for path in (pack / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def empty(path):
    path.write_bytes(b"")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def data_of(checkpoint):
    """The largest file."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


DAMAGES = {
    "data emptied": lambda checkpoint: empty(data_of(checkpoint)),
    "record halved": lambda checkpoint: halve(checkpoint / "_CHECKPOINT_METADATA"),
    "state lost": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside(copy, whole, caplog, damage):
    trials, pack = copy()
    assert steps(pack) == [6, 8]
    DAMAGES[damage](pack / "checkpoints" / "8")
    run_packed(trials)
    assert [outcome(trial) for trial in trials] == [outcome(trial) for trial in whole["plain"]]
    assert f"checkpoint is damaged, set aside as {pack}/damaged-checkpoint-8: " in caplog.text
    assert (pack / "damaged-checkpoint-8").is_dir() and not (pack / "checkpoints").exists()


def test_a_damaged_checkpoint_of_a_pack_that_shrank_since_the_older_one(copy, whole):
    trials, pack = copy("halving")
    assert steps(pack) == [3, 4]
    before = {path: path.stat().st_mtime_ns for path in pack.parents[1].glob("*/result.json")}
    assert len(before) == 3  # one had diverged, two were cut at step 4
    halve(data_of(pack / "checkpoints" / "4"))
    run_packed(trials)
    assert [outcome(trial) for trial in trials] == [outcome(trial) for trial in whole["halving"]]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("kind", KINDS)
def test_all_checkpoints_damaged_means_from_the_start(copy, whole, kind):
    trials, pack = copy(kind)
    for step in steps(pack):
        empty(data_of(pack / "checkpoints" / str(step)))
    run_packed(trials)
    assert [outcome(trial) for trial in trials] == [outcome(trial) for trial in whole[kind]]


@pytest.mark.parametrize("content", [None, b"[]"])
def test_pointers_to_the_pack_that_are_lost_or_damaged(copy, whole, content):
    trials, pack = copy()
    pointers = list(pack.parents[1].glob("*/packed.json"))
    assert len(pointers) == 4
    for path in pointers:
        path.unlink() if content is None else path.write_bytes(content)
    run_packed(trials)
    assert [outcome(trial) for trial in trials] == [outcome(trial) for trial in whole["plain"]]


@pytest.mark.parametrize("content", [None, b'{"trials": [', b"[]"])
def test_a_packs_record_that_is_lost_or_damaged(copy, whole, content):
    trials, pack = copy()
    before = {path: path.stat().st_mtime_ns for path in pack.parents[1].glob("*/result.json")}
    path = pack / "pack.json"
    path.unlink() if content is None else path.write_bytes(content)
    run_packed(trials)
    for trial, expected in zip(trials, whole["plain"], strict=True):
        assert_same_numbers(trial, expected)
    assert len(before) == 2 and before == {path: path.stat().st_mtime_ns for path in before}


def test_a_trial_whose_directory_was_deleted_starts_over(copy, whole):
    trials, _ = copy()
    shutil.rmtree(trial_dir(trials[1]))
    run_packed(trials)
    for trial, expected in zip(trials, whole["plain"], strict=True):
        assert_same_numbers(trial, expected)


@pytest.mark.parametrize("is_over", [True, False])
def test_a_trial_that_went_on_alone_meanwhile(copy, whole, is_over):
    trials, _ = copy()
    run_trial(trials[2])
    path = trial_dir(trials[2]) / "result.json"
    if not is_over:  # as if killed before its result
        path.unlink()
    before = path.stat().st_mtime_ns if is_over else None
    results = run_packed(trials)
    for trial, expected in zip(trials, whole["plain"], strict=True):
        assert_same_numbers(trial, expected)
    if is_over:
        assert path.stat().st_mtime_ns == before
        others = [n for n in range(6) if n != 2]
        assert all(outcome(trials[n]) == outcome(whole["plain"][n]) for n in others)
    assert [result["trial_id"] for result in results] == [trial_id(trial) for trial in trials]


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    is_linux = sys.platform == "linux" and Path("/bin/mount").exists()
    done = subprocess.run(mount, capture_output=True, check=False) if is_linux else None
    if done is None or done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("fault", ["limited", "full"])
def test_a_full_disk_in_the_middle(world, whole, capsys, fault, request):
    tmp_path = request.getfixturevalue("tmp_path")
    root = request.getfixturevalue("disk") if fault == "full" else tmp_path
    trials = trials_of(world, root)
    (code,), err = run_faulty(world, [(trials, fault, r"rename .*-lr1e-12-\S*/result.json ")])
    reason = "No space left on device" if fault == "full" else "File too large"
    print(err)
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith(f"error: cannot write {root}/tiny/") and line.endswith(f": {reason}")
    assert len(list(root.glob("tiny/*/result.json"))) == 2

    assert report.main([str(root / "tiny"), "--output", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "1 diverged" in said and "4 unfinished" in said

    (root / "filler").unlink(missing_ok=True)
    run_packed(trials)
    for trial, expected in zip(trials, whole["plain"], strict=True):
        assert outcome(trial) == outcome(expected)


@pytest.mark.parametrize("blocked", ["packs", "packs/{}/checkpoints", "packs/{}/pack.json"])
def test_something_else_where_a_packs_file_should_be(world, tmp_path, blocked):
    trials = trials_of(world, tmp_path)
    path = tmp_path / "tiny" / blocked.format(Pack(of(trials), 0).name)
    path.parent.mkdir(parents=True)
    path.mkdir() if path.suffix else path.write_text("")
    with pytest.raises(LoraxError, match=f"cannot write {tmp_path}/tiny/packs") as fault:
        run_packed(trials)
    assert "\n" not in str(fault.value)


@pytest.fixture
def read_only(tmp_path, request):
    """A directory that cannot be written, root or not."""
    if os.geteuid():
        place = tmp_path / "disk"
        place.mkdir(mode=0o500)
        return place
    place = request.getfixturevalue("disk")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    return place


def test_a_read_only_directory_is_one_line(world, read_only, cli):
    grid = ["-m", "hydra/launcher=packed", "lora.rank=1,2"]
    (ended,) = cli([world.overrides(read_only, *grid)])
    (line,) = ended["err"].splitlines()
    assert ended["code"] == 2
    assert line.startswith(f"error: cannot write {read_only}")
    with pytest.raises(LoraxError, match=f"cannot write {read_only}/tiny.*: [RP]e"):
        run_packed(trials_of(world, read_only))
