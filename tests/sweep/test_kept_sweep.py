"""A sweep that an earlier version wrote: it is read, reported, and resumed from where it was."""

import json
import logging

import pytest

from lorax.analysis.results import read_sweep
from lorax.runs.content import with_content
from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_packed, run_trials
from tests.helpers import kept_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(folder, trials by what became of them), in the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("kept"))
        world, folder = kept_sweep.write_world(), kept_sweep.unpack()
        trials = kept_sweep.trials_of(world)
        yield folder, {end: [with_content(t) for t in group] for end, group in trials.items()}


def files_of(trial):
    """The bytes of what a finished trial has left."""
    names = ("config.json", "metrics.jsonl", "result.json")
    return {name: (trial_dir(trial) / name).read_bytes() for name in names}


def test_its_trials_lie_where_they_are_looked_for(sweep):
    folder, trials = sweep
    kept = {path.name for path in folder.iterdir()} - {"packs"}
    assert {trial_dir(t).name for group in trials.values() for t in group} == kept


def test_the_report_reads_it(sweep):
    folder, _ = sweep
    read = read_sweep(folder)
    assert not read.warnings
    assert len(read.with_status("finished")) == 4 and len(read.with_status("unfinished")) == 3
    assert {t.mode for t in read.trials} == {"lora", "head"}


@pytest.mark.parametrize("end", ["packed", "alone", "head"])
def test_finished_trials_are_skipped(sweep, end):
    _, trials = sweep
    before = list(map(files_of, trials[end]))
    results = (run_packed if end == "packed" else run_trials)(trials[end])
    assert [json.loads(files["result.json"]) for files in before] == results
    assert list(map(files_of, trials[end])) == before


@pytest.mark.parametrize("end", ["packed, killed", "alone, killed"])
def test_killed_trials_resume_from_their_checkpoint(sweep, end, caplog):
    _, trials = sweep
    before = [(trial_dir(t) / "metrics.jsonl").read_text() for t in trials[end]]
    with caplog.at_level(logging.INFO):
        results = (run_packed if end == "packed, killed" else run_trials)(trials[end])
    assert "from step 4 of 8" in caplog.text
    for trial, old, result in zip(trials[end], before, results, strict=True):
        assert (trial_dir(trial) / "metrics.jsonl").read_text().startswith(old)
        assert result["status"] == "finished" and result["steps"] == 8
