"""The real W&B client, offline; what it wrote is read back from its log."""

import json
import logging
import re
import signal
import struct
import time

import pytest

from lorax.config import SweepConfig, TrackingConfig, TrialConfig
from lorax.errors import LoraxError
from lorax.runs import trackers as tracking
from lorax.runs.trial import Trial
from lorax.runs.trial_id import trial_dir, trial_id
from lorax.runtime import stop
from lorax.sweep import run_packed, run_trials
from lorax.train import run_trial
from tests.helpers.signals import SignalAt

pytestmark = pytest.mark.slow

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
    monkeypatch.setattr("lorax.runs.trackers._has_netrc_key", lambda: False)


@pytest.fixture
def trials(world, tmp_path, offline):
    """Two finished trials of one process."""
    tracking = {"kind": "wandb", "project": "tests"}
    train = {"max_steps": 4, "eval_every": 2, "log_every": 1}
    pair = [world.trial(tmp_path, seed=n, tracking=tracking, train=train) for n in (0, 1)]
    return [(trial, result) for trial, result in zip(pair, run_trials(pair), strict=True)]


def whole_run(trial):
    """All records of the trial's one run."""
    (path,) = (trial_dir(trial) / "wandb").glob("offline-run-*/run-*.wandb")
    return whole(path)


def whole(path):
    """All records of a run; W&B's own process may write the last after `finish`."""
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


def exit_codes(trial):
    return [r.exit.exit_code for r in whole_run(trial) if r.HasField("exit")]


def artifacts(trial):
    return [r.artifact.name for r in whole_run(trial) if r.HasField("artifact")]


def steps(found):
    return [dict(values(r.history.item))["_step"] for r in found if r.HasField("history")]


def test_no_fault_of_tracking_costs_a_trial_of_a_pack(world, tmp_path, offline, caplog):
    """Ids with a plus; a trial that diverges; one whose W&B folder cannot be made."""

    def trial(lr=0.01, targets="qv", seed=0):
        optimizer = {"lr": lr, "warmup_ratio": 0.0}
        train = {"max_steps": 4, "eval_every": 2, "log_every": 1}
        return world.trial(
            tmp_path,
            lora={"targets": targets},
            optimizer=optimizer,
            tracking={"kind": "wandb"},
            train=train,
            seed=seed,
        )

    good, diverging, blocked = pack = [trial(0.01, ["q", "mlp"]), trial(1e30), trial(seed=1)]
    assert all("+" in trial_id(t) for t in (good, diverging))
    block = trial_dir(blocked) / "wandb"
    block.parent.mkdir(parents=True)
    block.write_text("")
    with caplog.at_level(logging.WARNING, "lorax"):
        ends = [result["status"] for result in run_packed(pack)]
    assert ends == ["finished", "diverged", "finished"]
    assert artifacts(good) == [f"adapter-{trial_id(good)}".replace("+", "_")]
    assert exit_codes(good) == [0] and exit_codes(diverging) == [1]
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "lorax.runs.trackers")
    assert warning.startswith(f"{trial_id(blocked)}: W&B has failed (FileExistsError: ")
    metrics = (trial_dir(blocked) / "metrics.jsonl").read_bytes()

    block.unlink()
    before = (trial_dir(blocked) / "result.json").stat().st_mtime_ns
    run_packed(pack)  # the same command: nothing is trained
    assert (trial_dir(blocked) / "result.json").stat().st_mtime_ns == before
    assert (trial_dir(blocked) / "metrics.jsonl").read_bytes() == metrics
    found = whole_run(blocked)
    check_history([values(r.history.item) for r in found if r.HasField("history")], blocked)
    assert artifacts(blocked) == [f"adapter-{trial_id(blocked)}"] and exit_codes(blocked) == [0]
    assert not list(tmp_path.rglob(tracking.PENDING))
    assert len(list(tmp_path.rglob("offline-run-*"))) == 3  # those that W&B has are left alone


def tracked(sweep):
    """The config of a trial that W&B is told of."""
    return TrialConfig(tracking=TrackingConfig(kind="wandb"), sweep=SweepConfig(name=sweep))


def test_what_a_fault_kept_from_it_is_sent_when_the_trial_goes_on(tmp_path, offline, caplog):
    """The run is ended from outside, so that the client refuses the next record."""
    trial = Trial(tracked(sweep="s" * 200), tmp_path / "t")
    trial.directory.mkdir()
    lines = [{"kind": "train", "step": step, "loss": step / 2} for step in (1, 2, 3, 4)]
    both = tracking.open_tracker(trial, trial.config, 0)
    both.log(lines[0])
    both.log(lines[1])
    both._trackers[1]._tracker._run.finish()
    both.log(lines[2])
    both.log(lines[3])
    both.close(tracking.INTERRUPTED)
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "lorax.runs.trackers")
    assert "W&B has failed (UsageError: " in warning

    again = tracking.open_tracker(trial, trial.config, 3)  # the last checkpoint's step
    again.log(lines[3])
    again.close(tracking.INTERRUPTED)
    assert tracking.read_jsonl(trial.metrics) == lines
    first, second = map(whole, sorted(tmp_path.glob("t/wandb/offline-run-*/run-*.wandb")))
    assert (steps(first), steps(second)) == ([1, 2], [3, 4])
    (first_id, second_id) = (
        {r.run.run_id for r in f if r.HasField("run")} for f in (first, second)
    )
    assert first_id == second_id
    assert [r.exit.exit_code for r in second if r.HasField("exit")] == [255]


def test_a_trial_that_crashes_is_a_failed_run(world, tmp_path, offline):
    trial = world.trial(tmp_path, tracking={"kind": "wandb"})
    blocked = trial_dir(trial) / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    with pytest.raises(LoraxError, match="cannot write"):
        run_trial(trial)
    assert exit_codes(trial) == [1]


def test_a_trial_that_is_stopped_is_an_interrupted_run(world, tmp_path, offline):
    trial = world.trial(
        tmp_path,
        tracking={"kind": "wandb"},
        train={"max_steps": 60, "eval_every": 60, "log_every": 1},
    )
    with SignalAt(signal.SIGINT, trial, 3), pytest.raises(stop.Stopped), stop.at_entry_point():
        run_trial(trial)
    assert exit_codes(trial) == [255]


def test_a_server_that_is_not_reached_leaves_the_run_offline(
    tmp_path, offline, monkeypatch, caplog
):
    import wandb

    monkeypatch.setattr(tracking, "_REFUSALS", [])
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()
    try:
        for name in ("one", "two"):  # the second does not try
            trial = Trial(tracked(sweep="s"), tmp_path / name)
            trial.directory.mkdir()
            tracker = tracking.open_tracker(trial, trial.config, 0)
            tracker.log({"kind": "train", "step": 1, "loss": 0.5})
            tracker.close()
    finally:
        wandb.teardown()  # it has read the environment
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "lorax.runs.trackers")
    assert "cannot be reached" in warning and "wandb sync" in warning
    runs = list(tmp_path.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert [steps(whole(path)) for path in runs] == [[1], [1]]


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
