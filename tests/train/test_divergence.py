import json

import pytest

from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_trials
from lorax.sweep.run_serial import summary_line
from lorax.train import run_trial

ABSURD = {"lr": 1e30, "warmup_ratio": 0.0}


def strict_json(text):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def records(config):
    lines = (trial_dir(config) / "metrics.jsonl").read_text().splitlines()
    return [strict_json(line) for line in lines]


@pytest.mark.parametrize(
    ("train", "step", "what"),
    [
        ({"max_steps": 9}, 2, "loss"),
        ({"max_steps": 1}, 1, "dev accuracy"),  # the loss is that of the weights before the step
        ({"max_steps": 9, "eval_every": 1}, 1, "dev accuracy"),
    ],
)
def test_a_trial_ends_where_it_diverges(world, tmp_path, train, step, what):
    config = world.trial(tmp_path, optimizer=ABSURD, train=train)
    result = run_trial(config)
    assert result["status"] == "diverged"
    assert result["reason"].startswith(f"the {what} is ")
    assert result["reason"].endswith(f"at step {step}")
    assert result["best"] is result["last"] is None
    assert strict_json((trial_dir(config) / "result.json").read_text()) == result
    *before, last = records(config)
    assert (last["kind"], last["step"], last["loss"]) == ("diverged", step, None)
    assert "diverged" not in {r["kind"] for r in before}
    assert "diverged" in summary_line(result)


def test_evaluations_before_it_count(world, tmp_path):
    optimizer = {"lr": 1e36, "schedule": "linear", "warmup_ratio": 0.5}
    config = world.trial(tmp_path, optimizer=optimizer, train={"max_steps": 9, "eval_every": 1})
    result = run_trial(config)
    assert result["status"] == "diverged"
    assert result["best"]["step"] == result["last"]["step"] == 1  # warm-up starts at a rate of 0


def test_the_next_trial_of_a_sweep_is_as_if_alone(world, tmp_path):
    def pair(root):
        return world.trial(root, optimizer=ABSURD), world.trial(root, seed=3)

    bad, good = run_trials(pair(tmp_path / "sweep"))
    _, config = pair(tmp_path / "alone")
    alone = run_trial(config)
    assert (bad["status"], good["status"]) == ("diverged", "finished")
    assert (good["best"], good["last"]) == (alone["best"], alone["last"])


def test_it_is_not_tried_again(world, tmp_path):
    config = world.trial(tmp_path, optimizer=ABSURD)
    result = run_trial(config)
    path = trial_dir(config) / "result.json"
    before = path.stat().st_mtime_ns
    assert run_trial(config) == result
    assert path.stat().st_mtime_ns == before
