import json
import math

import pytest

from lorax.analysis.results import read_sweep
from lorax.errors import LoraxError
from tests.helpers.synthetic_sweep import make_config, make_cut_result, make_result, write_trial


def test_reads_config_result_and_curves(sweep):
    trial = read_sweep(sweep).trials[0]
    assert trial.config["lora.rank"] == 1
    assert trial.config["lora.rank_pattern"] == {}
    assert trial.status == "finished"
    assert trial.score() > trial.score("last")
    assert list(trial.curve("eval", "accuracy")) == [40, 80, 120]
    assert len(trial.curve("train", "loss")) == 60


def test_faults_become_warnings_that_name_the_file(faulty_sweep):
    sweep = read_sweep(faulty_sweep)
    assert [t.id for t in sweep.with_status("unfinished")] == ["broken-result", "unfinished"]
    assert [t.id for t in sweep.with_status("diverged")] == ["diverged"]
    assert "broken-config" not in {t.id for t in sweep.trials}
    assert len(sweep.warnings) == 3
    for name in ("broken-result/result.json", "broken-config/config.json", "line 64"):
        assert sum(name in warning for warning in sweep.warnings) == 1
    assert all("\n" not in warning for warning in sweep.warnings)


def test_unknown_status_is_unfinished(tmp_path):
    config = make_config()
    write_trial(tmp_path, "a", config, make_result(config, status="on fire"))
    sweep = read_sweep(tmp_path)
    assert sweep.trials[0].status == "unfinished"
    assert "on fire" in sweep.warnings[0]


def test_nan_and_foreign_values_are_missing(tmp_path):
    config = make_config()
    records = [{"kind": "train", "step": None, "loss": 1.0}, {"kind": "train", "step": 1}]
    result = make_result(config, score=math.nan) | {"seconds_per_step": "fast", "best": "none"}
    trial_dir = write_trial(tmp_path, "a", config, result, records)
    assert "best" in json.loads((trial_dir / "result.json").read_text())
    sweep = read_sweep(tmp_path)
    assert math.isnan(sweep.trials[0].score())
    assert math.isnan(sweep.trials[0].number("seconds_per_step"))
    assert sweep.trials[0].curve("train", "loss") == {}
    assert "finished without" in sweep.warnings[0]


def test_cut_is_a_status_of_its_own(halved_sweep):
    sweep = read_sweep(halved_sweep)
    assert len(sweep.with_status("cut")) == len(sweep.with_status("finished")) == 6
    trial = sweep.trials[0]
    assert [trial.cut_number(key) for key in ("step", "place", "of")] == [40, 12, 12]
    assert trial.lanes == 12
    assert math.isnan(sweep.with_status("finished")[0].cut_number("step"))


def test_packs_and_other_folders_are_no_trials(halved_sweep):
    sweep = read_sweep(halved_sweep)
    assert (halved_sweep / "packs").is_dir() and (halved_sweep / ".submitit").is_dir()
    assert len(sweep.trials) == 12
    assert sweep.warnings == ()


def test_sweep_as_a_name_and_as_a_section(tmp_path):
    for seed, section in enumerate(("default", {"name": "default", "halving": {"after": 40}})):
        config = make_config(seed=seed) | {"sweep": section}
        result = make_result(config)
        if seed == 0:  # as old as the name
            del result["lanes"], result["cut"]
        write_trial(tmp_path, f"s{seed}", config, result)
    sweep = read_sweep(tmp_path)
    assert sweep.warnings == ()
    assert [trial.config.get("sweep") for trial in sweep.trials] == ["default", None]
    assert sweep.trials[1].config["sweep.name"] == "default"
    assert [trial.lanes for trial in sweep.trials] == [1, 1]


def test_a_cut_without_its_record_is_still_a_cut(tmp_path):
    config = make_config()
    result = make_cut_result(config, 0.7, place=2) | {"cut": None}
    write_trial(tmp_path, "a", config, result)
    (trial,) = read_sweep(tmp_path).with_status("cut")
    assert math.isnan(trial.cut_number("place"))


def test_result_without_config_is_named(sweep):
    (sweep / "orphan").mkdir()
    (sweep / "orphan" / "result.json").write_text("{}")
    assert "orphan" in read_sweep(sweep).warnings[0]


def test_missing_directory(tmp_path):
    with pytest.raises(LoraxError, match="nowhere: no such sweep directory"):
        read_sweep(tmp_path / "nowhere")


def test_no_trials(tmp_path):
    with pytest.raises(LoraxError, match="no trials; expected"):
        read_sweep(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_file_too_deep_to_read_is_a_warning(sweep, name):
    path = next(sweep.glob(f"*/{name}"))
    path.write_text(100_000 * "[" + 100_000 * "]")
    (warning,) = read_sweep(sweep).warnings
    assert f"{path.parent.name}/{name}" in warning
