"""Help and hints of settings: generated from the schema, and in other libraries' names."""

import errno
import io
import sys
import types

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from tqdm.auto import tqdm

from lorax.config import TrialConfig
from lorax.launch import config_of
from lorax.launch.application import run_command
from lorax.launch.faults import flag_fault, meant_setting, system_fault
from lorax.launch.settings import SYNONYMS, all_settings, setting_names, settings_help
from lorax.runs.trial_id import trial_id
from lorax.sweep.summary import closing_lines
from lorax.train.run_trial import progress_bar
from tests.helpers.world import of


def test_every_setting_says_what_it_is():
    assert [setting.name for setting in all_settings() if not setting.about] == []


def test_the_help_has_every_setting_with_its_type_and_default(capsys, monkeypatch):
    assert "lora.alpha=16.0  (float)" in settings_help().splitlines()
    assert "train.remat=false  (bool)" in settings_help().splitlines()
    assert "train.max_steps=null  (int | None)" in settings_help().splitlines()
    assert max(map(len, settings_help().splitlines())) <= 100
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    run_command(lambda arguments: pytest.fail("the command ran"), "About the command.")
    said = capsys.readouterr().out
    assert said.startswith("About the command.\n")
    assert all(f"\n{name}=" in said for name in setting_names())


def test_synonyms_are_names_of_settings():
    assert {meant.partition("=")[0] for meant in SYNONYMS.values()} <= set(setting_names())
    with hydra.initialize_config_module("conf", version_base=None):
        config_of(hydra.compose("finetune", [meant for meant in SYNONYMS.values() if "=" in meant]))
    assert not set(SYNONYMS) & set(setting_names())


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora_r", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("peft.target_modules", "lora.targets"),
        ("per-device-train-batch-size", "train.batch_size"),
        ("train.seed", "seed"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("epochs", "train.epochs"),
        ("lora.rnak", "lora.rank"),
        ("zzzzz", None),
    ],
)
def test_a_name_of_another_library_is_understood(key, meant):
    assert meant_setting(key) == meant


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (("--epochs", "3"), "name=value: train.epochs=3"),
        (("--lora_r=8", "seed=1"), "name=value: lora.rank=8"),
        (("--train.epochs", "-m"), "name=value: train.epochs=..."),
        (("--use_rslora", None), "name=value: lora.scaling=rslora"),
        (("--zzzzz", "1"), "name=value, and --help lists them"),
    ],
)
def test_a_flag_is_told_as_an_override(words, form):
    assert flag_fault(*words) == (
        f"{words[0].partition('=')[0]} is not an option; settings are given as {form}"
    )


def test_the_form_that_sweeps_over_a_pattern():
    (sweep,) = OverridesParser.create().parse_overrides(["+lora.rank_pattern={query:4},{query:8}"])
    with hydra.initialize_config_module("conf", version_base=None):
        patterns = [
            config_of(hydra.compose("finetune", [f"+lora.rank_pattern={value}"])).lora.rank_pattern
            for value in sweep.sweep_string_iterator()
        ]
    assert patterns == [{"query": 4}, {"query": 8}]


def test_the_system_says_what_failed(tmp_path):
    def fault(number, path, target=None):
        return system_fault(OSError(number, "why", str(path), None, target and str(target)))

    (tmp_path / "file").write_text("")
    there, absent = tmp_path / "file", tmp_path / "absent"
    assert fault(errno.ENOENT, absent) == f"cannot read {absent}: why"
    assert fault(errno.EISDIR, tmp_path) == f"cannot read {tmp_path}: why"
    assert fault(errno.EIO, there) == f"cannot read {there}: why"
    assert fault(errno.EACCES, absent) == f"cannot write {absent}: why"
    assert fault(errno.ENOTDIR, there / "x") == f"cannot write {there / 'x'}: why"
    assert fault(errno.ENOSPC, there) == f"cannot write {there}: why"
    assert fault(errno.EISDIR, there, tmp_path) == f"cannot write {there}: why"
    assert system_fault(OSError(errno.ENOSPC, "why")) == "cannot write the output: why"
    assert system_fault(ConnectionResetError(errno.ECONNRESET, "why")) == "system error: why"


def test_a_long_name_leaves_the_score_in_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    trial = TrialConfig()
    trial.lora.targets = ["query", "value", "dense", "intermediate"]
    assert len(trial_id(trial)) > 40
    loop = types.SimpleNamespace(total_steps=12_000, step=0)
    with progress_bar(of([trial]), loop) as bar:
        assert "0/12000, compiling [" in tqdm.format_meter(**{**bar.format_dict, "ncols": 80})
        bar.set_postfix({"loss": "0.693", "best accuracy": "0.812"})
        line = tqdm.format_meter(**{**bar.format_dict, "ncols": 80})
    assert "0/12000, loss=0.693, best accuracy=0.812 [" in line


def test_nothing_ended_is_told_without_a_best_trial(tmp_path):
    trials = [TrialConfig(seed=n, output_dir=str(tmp_path / "no where")) for n in (0, 1, 1)]
    assert closing_lines(trials) == [
        "2 trials: 2 failed",
        f"report: python -m experiments.report '{tmp_path}/no where/default'",
    ]
