"""The real W&B client, offline; what it wrote is read back from its log."""

import json
import re
import struct
import time

import pytest

from lorax.sweep import run_trials
from lorax.trial_id import trial_dir, trial_id

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(path):
    """The messages of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, message = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        size, kind = struct.unpack("<HB", data[position + 4 : position + HEADER])
        message += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (FULL, LAST) and message:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def values(items):
    """Items of config, history or summary as a flat dict."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def offline(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lorax.tracking._has_netrc_key", lambda: False)


@pytest.fixture
def trials(world, tmp_path, offline):
    """Two finished trials of one process."""
    tracking = {"kind": "wandb", "project": "tests"}
    train = {"max_steps": 4, "eval_every": 2, "log_every": 1}
    pair = [world.trial(tmp_path, seed=n, tracking=tracking, train=train) for n in (0, 1)]
    return [(trial, result) for trial, result in zip(pair, run_trials(pair), strict=True)]


def whole_run(trial):
    """All records of the trial's one run; W&B's own process may write the last after `finish`."""
    (path,) = (trial_dir(trial) / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while not any(r.HasField("exit") for r in records(path)):
        assert time.monotonic() < deadline, f"{path} has no exit record"
        time.sleep(0.05)
    return list(records(path))


def test_two_trials_of_a_process_are_two_whole_runs(trials):
    for trial, result in trials:
        found = whole_run(trial)
        check_run(next(r.run for r in found if r.HasField("run")), trial)
        check_history([values(r.history.item) for r in found if r.HasField("history")], trial)
        check_summary([r.summary for r in found if r.HasField("summary")], result)
        assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]


def check_run(run, trial):
    assert (run.project, run.run_group, run.job_type) == ("tests", "tiny", "lora")
    assert run.display_name == trial_id(trial)
    assert re.fullmatch(rf"{trial_id(trial)}-[0-9a-f]{{8}}", run.run_id)
    config = values(run.config.update)
    assert config["seed"] == trial.seed
    assert config["lora"]["rank"] == 2 and config["lora"]["targets"] == "qv"
    assert config["optimizer"]["lr"] == 0.01
    assert config["trial_id"] == trial_id(trial)


def check_history(history, trial):
    """The same numbers as metrics.jsonl, by step."""
    lines = (trial_dir(trial) / "metrics.jsonl").read_text().splitlines()
    expected = {}
    for record in map(json.loads, lines):
        kind, step = record.pop("kind"), record.pop("step")
        row = expected.setdefault(step, {"optimizer_step": step})
        row |= {f"{kind}/{name}": value for name, value in record.items()}
    assert [row["_step"] for row in history] == list(expected) == [1, 2, 3, 4]
    for row in history:
        step = row["_step"]
        assert {k: v for k, v in row.items() if not k.startswith("_")} == expected[step]


def check_summary(summaries, result):
    summary = {}
    for part in summaries:
        summary |= values(part.update)
    nested = {k.split(".")[0] for k in summary}
    assert nested >= {"status", "best", "last", "adapter_params", "environment"}
    assert summary["status"] == "finished"
    assert summary["trainable_params"] == result["trainable_params"]


def test_the_adapter_is_an_artifact_of_the_run(trials):
    trial, _ = trials[0]
    (artifact,) = [r.artifact for r in whole_run(trial) if r.HasField("artifact")]
    assert (artifact.name, artifact.type) == (f"adapter-{trial_id(trial)}", "adapter")
    files = {entry.path for entry in artifact.manifest.contents}
    folder = trial_dir(trial) / "adapter"
    assert files == {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("kind", ["jsonl", "none"])
def test_without_wandb_there_is_jsonl_alone(world, tmp_path, offline, kind):
    trial = world.trial(tmp_path, tracking={"kind": kind})
    run_trials([trial])
    assert {path.name for path in trial_dir(trial).iterdir()} == {
        "adapter", "checkpoints", "config.json", "lock", "metrics.jsonl", "result.json",
    }  # fmt: skip
