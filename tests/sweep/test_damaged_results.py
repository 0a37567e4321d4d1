"""A damaged result is one line that names it; it does not stop a sweep of others."""

import json
import os

import pytest

from lorax.errors import LoraxError
from lorax.runs.content import with_content
from lorax.runs.results import read_result
from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_packed, run_trials
from lorax.sweep.damaged import without_damaged
from tests.helpers.world import ROOT, of

WHOLE = {
    "trial_id": "a",
    "status": "finished",
    "metric": "accuracy",
    "best": {"step": 4, "metrics": {"accuracy": 0.5}},
    "steps": 4,
    "trainable_params": 10,
    "seconds_total": 1.5,
}
SOUND = {
    "finished": WHOLE,
    "no score": {**WHOLE, "best": {"step": 4, "metrics": {"accuracy": None}}},
    "diverged": {"trial_id": "a", "status": "diverged", "reason": "x", "best": None},
    "cut": {**WHOLE, "status": "cut", "cut": {"step": 1, "place": 2, "of": 3}},
}
DAMAGED = {
    "empty": "",
    "half": '{"status": "fin',
    "no object": "[]",
    "a number": "5",
    "nothing in it": "{}",
    "deep": "[" * 100_000,
    "unknown status": json.dumps({**WHOLE, "status": ["finished"]}),
    "no steps": json.dumps({**WHOLE, "steps": "4"}),
    "no metric": json.dumps({**WHOLE, "metric": ["accuracy"]}),
    "another metric": json.dumps({**WHOLE, "metric": "f1"}),
    "a word for a score": json.dumps({**WHOLE, "best": {"step": 4, "metrics": {"accuracy": "x"}}}),
    "best is a list": json.dumps({**WHOLE, "best": []}),
    "cut without its place": json.dumps({**WHOLE, "status": "cut", "cut": {"step": 1}}),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_result_is_read(tmp_path, case):
    (tmp_path / "result.json").write_text(json.dumps(SOUND[case]))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    assert read_result(tmp_path) == SOUND[case]


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_result_is_one_line(tmp_path, case):
    (tmp_path / "result.json").write_text(DAMAGED[case])
    with pytest.raises(LoraxError) as fault:
        read_result(tmp_path)
    said = str(fault.value)
    assert said.startswith(f"{tmp_path}/result.json is damaged (") and "\n" not in said
    assert said.endswith("; delete it to run the trial again")


def test_a_result_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(LoraxError, match=f"^cannot read {tmp_path}/result.json: Is a directory$"):
        read_result(tmp_path)


@pytest.mark.parametrize("run", [run_trials, run_packed])
def test_the_others_are_trained_and_the_damaged_are_named(world, tmp_path, caplog, run):
    trials = [world.trial(tmp_path, seed=n, train={"max_steps": 2}) for n in range(4)]
    for n in (0, 2):
        trial_dir(trials[n]).mkdir(parents=True)
        (trial_dir(trials[n]) / "result.json").write_text("{}")
    with pytest.raises(LoraxError, match=r"s0-.*; so is 1 other result of this sweep$"):
        run(trials)
    assert [read_result(trial_dir(trials[n]))["status"] for n in (1, 3)] == ["finished"] * 2
    assert caplog.text.count("left out: ") == 2
    # Once deleted, as the line says, the trial is run.
    for n in (0, 2):
        (trial_dir(trials[n]) / "result.json").unlink()
    assert [result["status"] for result in run(trials)] == ["finished"] * 4


@pytest.mark.parametrize("line", ["{", "5", "{}", '{"step": "1"}'])
def test_damaged_records_leave_out_a_trial_that_goes_on_with_them(world, tmp_path, line):
    goes_on, starts_over = (world.trial(tmp_path, seed=n) for n in range(2))
    for trial in (goes_on, starts_over):
        trial_dir(trial).mkdir(parents=True)
        (trial_dir(trial) / "metrics.jsonl").write_text(f"{line}\n")
    (trial_dir(goes_on) / "checkpoints").mkdir()
    sound, damaged = without_damaged(of([goes_on, starts_over]))
    assert sound == [*of([starts_over])]
    (fault,) = damaged.values()
    assert str(fault).startswith(f"{trial_dir(goes_on)}/metrics.jsonl:1 is damaged (")


def test_commands_end_with_counts_the_best_trial_and_what_to_do_next(world, tmp_path, cli):
    """By both launchers; paths are relative, in a job that changes its directory, too."""
    root = os.path.relpath(tmp_path, ROOT)
    more = [f"model.source={os.path.relpath(world.source, ROOT)}", "hydra.job.chdir=true"]
    more += [f"task.data_dir={os.path.relpath(world.data_dir, ROOT)}", "train.max_steps=2"]
    trials = [with_content(world.trial(root, seed=n, train={"max_steps": 2})) for n in range(3)]
    for trial in trials:
        trial.model.source, trial.task.data_dir = more[0][13:], more[2][14:]
    damaged = trial_dir(trials[0])
    (ROOT / damaged).mkdir(parents=True)
    (ROOT / damaged / "result.json").write_text("{}")
    packed = ["-m", "hydra/launcher=packed", "seed=0,1,2", "tracking=wandb"]
    both = cli(
        [
            world.overrides(root, *more, "-m", "seed=0,1"),
            world.overrides(root, *more, *packed),
            world.overrides(root, *more, "seed=1"),
            world.overrides(root, "--help"),
        ]
    )
    results = [json.loads((ROOT / trial_dir(t) / "result.json").read_text()) for t in trials]
    scores = {trial_dir(trials[n]): results[n]["best"]["metrics"]["accuracy"] for n in (1, 2)}
    for ended, count in zip(both[:2], (1, 2), strict=True):
        assert ended["code"] == 2, ended["err"]
        (line,) = [line for line in ended["err"].splitlines() if "wandb" not in line]
        assert line.startswith(f"error: {damaged}/result.json is damaged (")
        told = f"{count + 1} trials: {count} finished, 1 failed"
        best = max(list(scores)[:count], key=scores.__getitem__)
        lines = ended["out"].splitlines()
        assert lines[lines.index(told) + 1 :][:2] == [
            f"best of sst2 by accuracy, {scores[best]:.4f}: {best}",
            f"report: python -m experiments.report {root}/tiny",
        ]
    offline = f"to send the offline runs to W&B: wandb sync {root}/tiny/*/wandb/offline-run-*"
    assert (offline in both[0]["out"], offline in both[1]["out"]) == (False, True)
    assert (both[2]["code"], both[2]["out"].count("is finished, skipped")) == (0, 1)
    assert "lora.rank=8  (int)" in both[3]["out"] and both[3]["code"] == 0
