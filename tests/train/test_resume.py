"""A trial that goes on from damaged or partial files ends with the same numbers."""

import shutil

import jax
import numpy as np
import pytest

from lorax.config import TrialConfig
from lorax.runs.adapter import load_adapter
from lorax.runs.restore import restore
from lorax.runs.trial import Trial
from lorax.runs.trial_id import trial_dir
from lorax.train import run_trial
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import init_state

pytestmark = pytest.mark.production

TRAIN = {"max_steps": 20, "eval_every": 5, "checkpoint_every": 3, "log_every": 1}
DROPOUT = {"model": {"dropout": 0.2}, "lora": {"rank": 2, "dropout": 0.2}}


def outcome(config, result):
    """All that a cut must not change, byte for byte."""
    directory = trial_dir(config)
    flat, spec, about = load_adapter(directory / "adapter")
    arrays = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
    ends = {name: result[name] for name in ("status", "best", "last", "steps", "stopped_early")}
    return (directory / "metrics.jsonl").read_bytes(), ends, arrays, spec, about


def cut_off(directory):
    """Back to where a trial is that was killed before its result was written."""
    (directory / "result.json").unlink()
    shutil.rmtree(directory / "adapter")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished trial and its outcome; copy its directory before changing it."""
    config = world.trial(tmp_path_factory.mktemp("whole"), train=TRAIN, **DROPOUT)
    return config, outcome(config, run_trial(config))


@pytest.fixture
def copy(world, finished, tmp_path):
    """The finished trial in a directory of its own, without its result: (config, directory)."""
    config = world.trial(tmp_path, train=TRAIN, **DROPOUT)
    shutil.copytree(trial_dir(finished[0]), trial_dir(config))
    cut_off(trial_dir(config))
    return config, trial_dir(config)


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_from_the_last_checkpoint(copy, finished):
    config, _ = copy
    assert outcome(config, run_trial(config)) == finished[1]


def test_records_after_the_checkpoint_are_written_once(copy, finished):
    config, directory = copy
    shutil.rmtree(directory / "checkpoints" / "20")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2')
    assert outcome(config, run_trial(config)) == finished[1]


@pytest.fixture(scope="module")
def like(finished):
    """Arrays of the shapes that the trial's checkpoints hold."""
    config, _ = finished
    setup = prepare(config)
    state = init_state(setup.trainable, hyper_of(config), setup.dropout_key)
    return {"state": state, "best": jax.tree.map(np.asarray, state.trainable)}


def restored(directory, like):
    """What a trial goes on from: its arrays' bytes, and the record."""
    arrays, record = restore(Trial(TrialConfig(), directory), like)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(arrays)], record["progress"]


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_whichever_file_is_damaged_a_whole_checkpoint_is_restored(
    copy, like, keep, caplog, tmp_path
):
    _, directory = copy
    checkpoints, saved = directory / "checkpoints", tmp_path / "saved"
    shutil.copytree(checkpoints, saved)
    newest = restored(directory, like)
    shutil.rmtree(checkpoints / "20")
    older = restored(directory, like)
    assert (older[1]["step"], newest[1]["step"]) == (18, 20)
    fell_back = 0
    names = [path.relative_to(saved) for path in files_of(saved / "20")]
    assert len(names) > 5
    for name in names:
        shutil.rmtree(checkpoints)
        shutil.copytree(saved, checkpoints)
        path = checkpoints / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        caplog.clear()
        is_set_aside = restored(directory, like) == older
        assert is_set_aside == ("set aside" in caplog.text), name
        assert is_set_aside or restored(directory, like) == newest, name
        fell_back += is_set_aside
    assert fell_back >= 3


def test_a_damaged_newest_checkpoint(copy, finished, caplog):
    config, directory = copy
    path = max(files_of(directory / "checkpoints" / "20"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert outcome(config, run_trial(config)) == finished[1]
    assert "set aside" in caplog.text
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["18", "20"]


@pytest.mark.parametrize("lost", ["state", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_lost_part_of_the_newest_checkpoint(copy, like, lost):
    _, directory = copy
    path = directory / "checkpoints" / "20" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert restored(directory, like)[1]["step"] == 18


def test_all_checkpoints_damaged_means_from_the_start(copy, finished):
    config, directory = copy
    for path in files_of(directory / "checkpoints"):
        path.write_bytes(b"")
    assert outcome(config, run_trial(config)) == finished[1]


def test_a_half_written_checkpoint_is_never_loaded(copy, finished):
    config, directory = copy
    checkpoints = directory / "checkpoints"
    (checkpoints / "20").rename(checkpoints / "20.orbax-checkpoint-tmp")
    (checkpoints / "20.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    assert outcome(config, run_trial(config)) == finished[1]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["18", "20"]


def test_a_half_written_adapter_is_replaced(copy, finished):
    config, directory = copy
    (directory / "adapter" / "state").mkdir(parents=True)
    (directory / "adapter" / "state" / "junk").write_text("junk")
    (directory / "result.json.partial").write_text('{"status": "fini')
    assert outcome(config, run_trial(config)) == finished[1]
    assert not list(directory.rglob("junk"))


def test_after_early_stopping_it_does_not_train_on(world, tmp_path):
    train = {**TRAIN, "eval_every": 2, "early_stopping": 2}
    config = world.trial(tmp_path, train=train, optimizer={"lr": 1e-12})
    expected = outcome(config, run_trial(config))
    cut_off(trial_dir(config))
    assert outcome(config, run_trial(config)) == expected
    assert expected[1]["steps"] == 6


def test_a_finished_trial_is_skipped(finished):
    config, _ = finished
    path = trial_dir(config) / "result.json"
    before = path.stat().st_mtime_ns
    result = run_trial(config)
    assert path.stat().st_mtime_ns == before
    assert result["status"] == "finished"


def test_starting_over_forgets_all_that_was_there(copy, finished):
    config, directory = copy
    (directory / "result.json").write_text("{}")
    (directory / "checkpoints" / "20").rename(directory / "checkpoints" / "999")
    assert outcome(config, run_trial(config, resume=False)) == finished[1]
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["18", "20"]
