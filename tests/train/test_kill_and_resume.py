"""SIGKILL at several moments of `python -m experiments.finetune`, and the same command again."""

import json

import numpy as np
import pytest

from lorax.runs.adapter import load_adapter

pytestmark = pytest.mark.production

OVERRIDES = [
    "train.max_steps=60",
    "train.checkpoint_every=4",
    "train.eval_every=10",
    "train.log_every=1",
    "train.max_shapes=2",
    "model.dropout=0.1",
    "lora.dropout=0.1",
]


def trial_of(root):
    return next((root / "tiny").glob("sst2-*"), root)


def steps(root):
    """Steps of the whole checkpoints."""
    names = (path.name for path in (trial_of(root) / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def lines(root):
    path = trial_of(root) / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def is_writing(root, what):
    """Whether Orbax's temporary folder of a checkpoint or of the adapter is there."""
    folders = trial_of(root), trial_of(root) / "checkpoints"
    names = [path.name for folder in folders for path in folder.glob("*")]
    return any(name.startswith(what) and "tmp" in name for name in names)


def started(root):
    return (trial_of(root) / "config.json").exists()


MOMENTS = {
    "before its first step": started,
    "in the middle of an epoch": lambda root: lines(root) >= 7,
    "while a checkpoint is written": lambda root: lines(root) > 20 and is_writing(root, ""),
    "after a later checkpoint": lambda root: max(steps(root), default=0) >= 40,
    "between two checkpoints": lambda root: lines(root) >= 53,
    "while the adapter is written": lambda root: is_writing(root, "adapter"),
}


def outcome(root):
    directory = trial_of(root)
    result = json.loads((directory / "result.json").read_text())
    arrays, spec, about = load_adapter(directory / "adapter")
    return {
        "metrics": (directory / "metrics.jsonl").read_bytes(),
        "result": {k: result[k] for k in ("status", "best", "last", "steps", "trial_id")},
        "adapter": {path: np.asarray(leaf).tobytes() for path, leaf in arrays.items()},
        "about": (spec, about),
    }


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    done = world.finetune(*world.overrides(root, *OVERRIDES))
    assert done.returncode == 0, done.stderr
    return outcome(root)


def test_killed_at_every_kind_of_moment_it_ends_with_the_same_numbers(
    world, tmp_path, uninterrupted
):
    command = "-m", "experiments.finetune", *world.overrides(tmp_path, *OVERRIDES)
    for moment, is_time in MOMENTS.items():
        world.kill_when(world.start(*command), lambda is_time=is_time: is_time(tmp_path))
        assert not (trial_of(tmp_path) / "result.json").exists(), moment
    done = world.finetune(*world.overrides(tmp_path, *OVERRIDES))
    assert done.returncode == 0, done.stderr
    assert "resumes from step 60 of 60" in done.stdout + done.stderr
    assert outcome(tmp_path) == uninterrupted
    assert steps(tmp_path) == [56, 60] and not is_writing(tmp_path, "")

    path = trial_of(tmp_path) / "result.json"
    before = path.stat().st_mtime_ns
    again = world.finetune(*world.overrides(tmp_path, *OVERRIDES))
    assert again.returncode == 0 and "is finished, skipped" in again.stdout + again.stderr
    assert path.stat().st_mtime_ns == before
