"""A disk that cannot be written: one line that names the place, exit status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorax.errors import LoraxError
from lorax.lora import LoraSpec
from lorax.runs.adapter import save_adapter
from lorax.runs.checkpoints import Checkpoints
from lorax.runs.trial_id import trial_dir
from lorax.train import run_trial

pytestmark = pytest.mark.slow

LIMITED = """
import json, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
runpy.run_module("experiments.finetune", run_name="__main__")
"""


def test_a_file_where_a_directory_should_be(world, tmp_path):
    (tmp_path / "tiny").write_text("")
    with pytest.raises(LoraxError, match=f"cannot write {tmp_path}/tiny.*: Not a directory"):
        run_trial(world.trial(tmp_path))


@pytest.mark.parametrize("blocked", ["checkpoints", "metrics.jsonl", "config.json"])
def test_something_else_where_a_trials_file_should_be(world, tmp_path, blocked):
    config = world.trial(tmp_path)
    path = trial_dir(config) / blocked
    path.parent.mkdir(parents=True)
    if path.suffix:
        (path / "inside").mkdir(parents=True)
    else:
        path.write_text("")
    with pytest.raises(LoraxError, match="cannot write") as fault:
        run_trial(config)
    assert "\n" not in str(fault.value)
    assert not (trial_dir(config) / "result.json").exists()


@pytest.mark.parametrize("limit", [200, 20_000])  # in a file of Hydra; in one of TensorStore
def test_a_full_disk_is_one_line(world, tmp_path, limit):
    overrides = world.overrides(tmp_path, "lora.rank=16", "lora.targets=all-linear")
    process = world.start("-c", LIMITED, limit, *overrides, JAX_ENABLE_COMPILATION_CACHE="0")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    place = "the output" if limit == 200 else trial_of(tmp_path) / "checkpoints"
    assert err.splitlines() == [f"error: cannot write {place}: File too large"]
    assert not list(tmp_path.rglob("result.json"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False) if is_linux() else None
    if done is None or done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def trial_of(root):
    return next((root / "tiny").glob("sst2-*"))


def is_linux() -> bool:
    return sys.platform == "linux" and Path("/bin/mount").exists()


def test_no_space_left_is_an_os_error_that_names_the_place(small_disk):
    import numpy as np

    big = {"x": np.random.default_rng(0).normal(size=30_000)}
    checkpoints = Checkpoints(small_disk / "checkpoints")
    with pytest.raises(OSError, match=f"No space left on device: '{small_disk}/checkpoints'"):
        checkpoints.save(1, big, {"step": 1})
    lora = {"lora": {"q.kernel": {"a": big["x"], "b": big["x"]}}}
    with pytest.raises(OSError, match="No space left on device"):
        save_adapter(small_disk / "adapter", lora, LoraSpec(), {})


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_all_that_a_result_speaks_of_reaches_the_disk_before_it(world, tmp_path, monkeypatch):
    directory, sync, events = trial_dir(world.trial(tmp_path)), os.fsync, []

    def noted(handle):
        events.append(Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run_trial(world.trial(tmp_path))
    result = events.index(directory / "result.json.partial")
    assert events[result + 1] == directory  # its new name, too
    files = {path for path in (directory / "adapter").rglob("*") if path.is_file()}
    assert len(files) > 3
    assert files | {directory / "adapter", directory / "metrics.jsonl"} <= set(events[:result])
