import io
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir
from lorax.train import run_trial
from lorax.train.dataset import load_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


def records(config, kind):
    lines = (trial_dir(config) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_best_and_last_are_of_the_evaluations(world, tmp_path):
    optimizer = {"lr": 0.1, "schedule": "constant", "warmup_ratio": 0.0}
    config = world.trial(tmp_path, optimizer=optimizer, train={"max_steps": 12, "eval_every": 2})
    result, evaluations = run_trial(config), records(config, "eval")
    assert [r["step"] for r in evaluations] == [2, 4, 6, 8, 10, 12]
    best = max(evaluations, key=lambda r: r["accuracy"])  # the first of equals
    share = load_dataset(config).dev["dev"].labels.mean()
    majority = [pytest.approx(share), pytest.approx(1 - share)]  # what one class for all scores
    for point, record in ((result["best"], best), (result["last"], evaluations[-1])):
        metrics = {"accuracy": record["accuracy"], "loss": record["loss"]}
        expected = {"step": record["step"], "epoch": record["epoch"], "metrics": metrics}
        told = {"constant": True} if record["accuracy"] in majority else {}
        assert point == expected | told
    assert result["best"] != result["last"]
    assert "constant" in result["last"] and "constant" not in result["best"]


def test_the_adapter_is_the_best_evaluations(world, tmp_path):
    optimizer = {"lr": 0.3, "schedule": "constant", "warmup_ratio": 0.0}
    long = world.trial(tmp_path, optimizer=optimizer, train={"max_steps": 12, "eval_every": 1})
    best = run_trial(long)["best"]["step"]
    assert best < 12
    short = world.trial(tmp_path, optimizer=optimizer, train={"max_steps": best, "eval_every": 1})
    run_trial(short)
    kept, _, about = load_adapter(trial_dir(long) / "adapter")
    expected, _, _ = load_adapter(trial_dir(short) / "adapter")
    assert about["best"]["step"] == best
    assert kept.keys() == expected.keys()
    for path, leaf in kept.items():
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ({"max_steps": None, "epochs": 2}, [10, 20]),  # 150 examples in batches of 16
        ({"max_steps": 7}, [7]),
        ({"max_steps": 23, "epochs": 1}, [10, 20, 23]),
        ({"max_steps": 5, "eval_every": 2}, [2, 4, 5]),
    ],
)
def test_when_it_evaluates_and_ends(world, tmp_path, train, evaluated):
    config = world.trial(tmp_path, train=train)
    result = run_trial(config)
    assert [r["step"] for r in records(config, "eval")] == evaluated
    assert result["steps"] == evaluated[-1] == result["last"]["step"]
    assert result["last"]["epoch"] == pytest.approx(evaluated[-1] / 10)
    assert sum(result["steps_by_tokens"].values()) == evaluated[-1]


def test_early_stopping_counts_evaluations_without_a_better_one(world, tmp_path):
    train = {"max_steps": 20, "eval_every": 2, "early_stopping": 3}
    config = world.trial(tmp_path, optimizer={"lr": 1e-12}, train=train)
    result = run_trial(config)
    assert (result["best"]["step"], result["steps"], result["stopped_early"]) == (2, 8, True)
    assert [r["step"] for r in records(config, "eval")] == [2, 4, 6, 8]
    assert result["status"] == "finished"


def test_training_records_follow_log_every_and_the_schedule(world, tmp_path):
    optimizer = {"lr": 0.01, "warmup_ratio": 0.2}
    config = world.trial(tmp_path, optimizer=optimizer, train={"max_steps": 10, "log_every": 4})
    run_trial(config)
    steps = {r["step"]: r["lr"] for r in records(config, "train")}
    expected = {1: 0.0, 4: 0.01 * 7 / 8, 8: 0.01 * 3 / 8}
    assert steps == pytest.approx(expected, rel=1e-5)


def test_a_trial_learns(world, tmp_path):
    result = run_trial(world.trial(tmp_path, train={"max_steps": None, "epochs": 20}))
    assert result["best"]["metrics"]["accuracy"] > 0.9


def test_the_result_counts_parameters_and_costs(world, tmp_path):
    result = run_trial(world.trial(tmp_path, train={"base_dtype": "bf16"}))
    encoder = 212 * 32 + 40 * 32 + 2 * 32 + 64  # embeddings, their norm
    encoder += 2 * (4 * (32 * 32 + 32) + 2 * 64 + 2 * 32 * 64 + 64 + 32)
    counts = {"adapter_params": 2 * 2 * 2 * 64, "head_params": 66, "base_params": encoder}
    total = sum(counts.values())
    counts |= {"trainable_params": 512 + 66, "total_params": total, "base_bytes": 2 * encoder}
    assert {name: result[name] for name in counts} == counts
    for cost in ("seconds_per_step", "flops_per_step", "step_memory_bytes", "peak_rss_bytes"):
        assert result[cost] > 0


def test_checkpoints_go_when_the_trial_has_ended(world, tmp_path):
    config = world.trial(tmp_path, train={"keep_checkpoints": False})
    run_trial(config)
    assert not (trial_dir(config) / "checkpoints").exists()
    assert (trial_dir(config) / "adapter").exists()


def test_one_process_at_a_time(world, tmp_path):
    config = world.trial(tmp_path)
    trial_dir(config).mkdir(parents=True)
    hold = "import sys; from pathlib import Path; from lorax.runs.lock import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(trial_dir(config))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LoraxError, match=f"another process .process {other.pid} on"):
            run_trial(config)
        other.kill()
        other.wait()
    assert run_trial(config)["status"] == "finished"  # a dead process holds nothing


def test_the_bar_says_what_takes_long(world, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    train = {"max_steps": 2, "eval_every": 1, "log_every": 1}
    run_trial(world.trial(tmp_path, tracking={"kind": "jsonl"}, train=train))
    shown = re.findall(r"/2, (\w+)", sys.stderr.getvalue())
    order = [name for name, _ in itertools.groupby(shown)]
    assert order == ["compiling", "loss", "evaluating", "loss", "evaluating", "loss"]
