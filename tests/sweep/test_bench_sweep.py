"""The timing script's parts that do not time: commands, faults, tables."""

import json
import os
import re
import sys
from pathlib import Path

import bench_sweep
import pytest
from bench_sweep import BenchError, Trial
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from lorax.launch import config_of
from lorax.runs.trial_id import trial_id

GRID = bench_sweep.grid([2, 4], [0, 1, 2])


@pytest.fixture
def options(tmp_path):
    return asked(tmp_path)


def asked(tmp_path, *more):
    """Options for data and a base that are there in name only."""
    for path in ("glue/CoLA/train.tsv", "glue/CoLA/dev.tsv"):
        write(tmp_path / path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        write(tmp_path / "it's a base" / name)
    places = ["--data-dir", tmp_path / "glue", "--model", tmp_path / "it's a base"]
    words = [*places, "--out", tmp_path / "out", "--seeds", "0", "--ranks", "2,4", *more]
    return bench_sweep.parse([str(word) for word in words])


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def composed(command):
    """Each job of a command line of experiments.finetune, as Hydra would compose it."""
    assert command[:2] == ["-m", "experiments.finetune"]
    words = [word for word in command[2:] if word != "-m"]
    overrides = OverridesParser.create().parse_overrides(words)
    if "-m" not in command[2:]:
        assert not any(override.is_sweep_override() for override in overrides)
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    with initialize_config_module("conf", version_base=None):
        return [config_of(compose("finetune", list(job))) for job in jobs]


def without_launcher(command):
    return [word for word in command if not word.startswith("hydra/launcher=")]


def launcher_of(command):
    return [word for word in command if word.startswith("hydra/launcher=")]


@pytest.mark.parametrize(
    "way", [way for way in bench_sweep.WAYS if way not in bench_sweep.PEFT_WAYS]
)
def test_every_way_of_lorax_runs_the_same_trials(way, options, tmp_path):
    lines = bench_sweep.commands(way, GRID, options, tmp_path / "results")
    trials = [trial for line in lines for trial in composed(without_launcher(line))]
    assert len(lines) == (len(GRID) if way == "process" else 1)
    assert [(trial.lora.rank, trial.seed) for trial in trials] == [tuple(cell) for cell in GRID]
    assert len({trial_id(trial) for trial in trials}) == len(GRID)
    for trial in trials:
        assert trial.output_dir == str(tmp_path / "results")
        assert trial.model.source == str(tmp_path / "it's a base")
        assert trial.train.max_steps == trial.train.eval_every == 100
        assert not trial.train.keep_checkpoints
        assert (trial.lora.targets, trial.lora.alpha, trial.optimizer.lr) == ("qv", 16, 1e-3)
        assert trial.lora.dropout == trial.model.dropout == 0


def test_ways_in_one_process_name_their_launcher(options, tmp_path):
    for way, launcher in bench_sweep.LAUNCHERS.items():
        (line,) = bench_sweep.commands(way, GRID, options, tmp_path)
        assert launcher_of(line) == [f"hydra/launcher={launcher}"]


@pytest.mark.parametrize("launcher", list(bench_sweep.LAUNCHERS.values()))
def test_launchers_are_there(launcher):
    with initialize_config_module("conf", version_base=None):
        compose("finetune", [f"hydra/launcher={launcher}"])


def test_further_overrides_come_last(tmp_path):
    options = asked(tmp_path, "train.pad_rank=4", "optimizer.lr=0.5")
    (line,) = bench_sweep.commands("serial", GRID, options, tmp_path)
    trials = composed(without_launcher(line))
    assert {(trial.train.pad_rank, trial.optimizer.lr) for trial in trials} == {(4, 0.5)}


def test_peft_runs_the_same_trials(options, tmp_path):
    import peft_trial

    lines = bench_sweep.commands("peft", GRID, options, tmp_path)
    theirs = [peft_trial.parse(line[1:]) for line in lines]
    assert [(x.rank, x.seed) for x in theirs] == [tuple(cell) for cell in GRID]
    assert len({x.out for x in theirs}) == len(GRID)
    assert {(x.task, x.steps, x.lr, x.batch_size) for x in theirs} == {("cola", 100, 1e-3, 32)}
    assert {(x.model, x.data_dir) for x in theirs} == {(options.model, options.data_dir)}


def test_peft_reads_what_lorax_reads(tmp_path):
    import peft_trial

    from lorax.data.tasks import TASKS
    from lorax.data.tasks.glue import read_tsv

    write(tmp_path / "CoLA.tsv", 'gj04\t1\t\tA "quoted text .\nks08\t0\t*\tMe like it \n')
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    write(tmp_path / "MRPC.tsv", f'{header}1\t7\t8\tOne .\tTwo .\n0\t9\t8\t"A\tB\n')
    header = "index\tsentence1\tsentence2\tlabel\n"
    rows = "0\tOne .\tTwo .\tnot_entailment\n1\tA\tB\tentailment\n"
    write(tmp_path / "RTE.tsv", header + rows)
    for name, task in peft_trial.TASKS.items():
        path = tmp_path / f"{task.folder}.tsv"
        theirs, ours = peft_trial.read_split(name, path), read_tsv(TASKS[name], path)
        assert theirs.texts == [x for x in (ours.first, ours.second) if x is not None]
        assert theirs.labels == ours.labels.tolist()
        assert task.metrics == (*TASKS[name].metrics,)


def test_growth_takes_all_ranks_with_more_and_more_seeds():
    ranks = [2, 4, 8, 16]
    assert bench_sweep.growth_grid(1, ranks) == (Trial(4, 0),)
    sixteen = bench_sweep.growth_grid(16, ranks)
    assert {trial.rank for trial in sixteen} == {*ranks}
    assert {trial.seed for trial in sixteen} == {0, 1, 2, 3}
    assert len(sixteen) == 16
    with pytest.raises(BenchError, match="6 is neither 1 nor a multiple of 4 ranks"):
        bench_sweep.growth_grid(6, ranks)


def record(way, wall, trials=2, score=0.5, loss=0.25):
    results = [
        {"metric": "matthews", "metrics": {"matthews": score + n, "loss": loss}}
        for n in range(trials)
    ]
    costs = {"wall_seconds": wall, "cpu_seconds": 2 * wall, "peak_bytes": 3_000_000}
    return {"way": way, "trials": trials, "results": results, **costs}


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ratios_are_to_packed():
    measured = [record("peft", 30.0), record("packed", 10.0), record("plain", 25.0)]
    head, rule, *rows = cells(bench_sweep.ways_table(measured, ["peft", "packed", "plain"]))
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert head[3] == "times packed"
    assert rows[0] == ["peft", "30.0", "15.00", "3.00", "60.0", "3", "1.0000", "0.2500", "2"]
    assert [line[3] for line in rows] == ["3.00", "1.00", "2.50"]


def test_repeats_show_their_median_and_range():
    measured = [record("packed", wall) for wall in (10.0, 30.0, 11.0)] + [record("plain", 22.0)]
    _, _, packed, plain = cells(bench_sweep.ways_table(measured, ["packed", "plain"]))
    assert packed[1] == "11.0 (10.0 to 30.0)"
    assert plain[3] == "2.00"


def test_without_packed_ratios_are_to_the_first_way():
    measured = [record("plain", 20.0), record("peft", 50.0)]
    head, _, *rows = cells(bench_sweep.ways_table(measured, ["plain", "peft"]))
    assert head[3] == "times plain"
    assert [line[3] for line in rows] == ["1.00", "2.50"]


def test_growth_is_relative_to_the_smallest_number():
    measured = [record("packed", 12.0, trials=4), record("packed", 8.0, trials=1)]
    head, rule, *rows = cells(bench_sweep.growth_table(measured, ["packed"]))
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert [line[1:5] for line in rows] == [
        ["1", "8.0", "8.00", "1.00"],
        ["4", "12.0", "3.00", "1.50"],
    ]


def stand_in(monkeypatch, script, calls=None):
    """Every way is one process of `script`, which gets the way and its folder as arguments."""

    def commands(way, trials, options, folder):
        if calls is not None:
            calls.append(way)
        return [["-c", script, way, str(folder)]]

    monkeypatch.setattr(bench_sweep, "commands", commands)


def run(options, monkeypatch, capsys):
    """What `main` does with these options: exit code and both streams."""
    with monkeypatch.context() as patch:
        patch.setattr(bench_sweep, "parse", lambda _: options)
        code = bench_sweep.main([])
    return code, *capsys.readouterr()


LEAVES_RESULTS = """
import json, os, pathlib, sys
assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
for n in range(2):
    folder = pathlib.Path(sys.argv[2], f"trial-{n}")
    folder.mkdir()
    last = {"metrics": {"matthews": 0.5, "loss": 0.25}}
    result = {"status": "finished", "metric": "matthews", "last": last}
    (folder / "result.json").write_text(json.dumps(result))
"""
FAILS_IN_PLAIN = (
    LEAVES_RESULTS
    + """
if sys.argv[1] == "plain":
    sys.exit("first\\nerror: no such launcher")
"""
)


def test_ways_are_measured_in_order_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere")
    calls = []
    stand_in(monkeypatch, LEAVES_RESULTS, calls)
    options = asked(tmp_path, "--ways", "process,packed", "--repeat", "2")
    code, out, err = run(options, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert calls == ["process", "packed"] * 2
    assert "in this order: process, packed" in out
    assert "| packed |" in out
    kept = json.loads((tmp_path / "out/bench_sweep.json").read_text())["measured"].values()
    assert [x["way"] for x in kept] == calls
    assert all(x["wall_seconds"] > 0 and x["peak_bytes"] > 1e6 for x in kept)
    assert run(options, monkeypatch, capsys)[0] == 0
    assert len(calls) == 4  # nothing was measured again


def test_a_failing_way_is_one_line_and_earlier_ways_are_kept(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, FAILS_IN_PLAIN)
    options = asked(tmp_path, "--ways", "packed,plain,process")
    code, _, err = run(options, monkeypatch, capsys)
    assert code == 2
    assert re.fullmatch(
        r"error: plain: exit status 1: first \| error: no such launcher \(all of it: .*\)\n", err
    )
    kept = json.loads((tmp_path / "out/bench_sweep.json").read_text())["measured"].values()
    assert [x["way"] for x in kept] == ["packed"]


def test_a_way_that_leaves_too_few_results_fails(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, LEAVES_RESULTS)
    options = asked(tmp_path, "--ways", "packed", "--ranks", "2,4,8")
    code, _, err = run(options, monkeypatch, capsys)
    assert code == 2
    assert err.startswith("error: packed: 2 of 3 trials left a result in ")
    assert err.count("\n") == 1


def test_what_is_missing_is_said_before_work(tmp_path, monkeypatch, capsys):
    calls = []
    stand_in(monkeypatch, LEAVES_RESULTS, calls)
    options = asked(tmp_path)
    (options.model / "model.safetensors").unlink()
    code, out, err = run(options, monkeypatch, capsys)
    assert (code, out, calls) == (2, "", [])
    assert re.fullmatch(r"error: no .*model.safetensors: python scripts/fetch_assets.py .*\n", err)
    options = asked(tmp_path)
    (options.data_dir / "CoLA/dev.tsv").unlink()
    code, out, err = run(options, monkeypatch, capsys)
    assert (code, out, calls) == (2, "", [])
    assert re.fullmatch(r"error: no CoLA/train.tsv and dev.tsv in .*: name GLUE's root\n", err)
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, LEAVES_RESULTS)
    assert run(asked(tmp_path, "--ways", "packed"), monkeypatch, capsys)[0] == 0
    other = asked(tmp_path, "--ways", "packed", "--steps", "7")
    code, _, err = run(other, monkeypatch, capsys)
    assert code == 2
    assert "bench_sweep.json is of other settings: give another --out, or delete it" in err


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak is Linux's")
def test_a_peak_that_the_process_forgot_still_counts(tmp_path):
    script = "import time; x = bytearray(200_000_000); time.sleep(0.5); del x;"
    script += "open('/proc/self/clear_refs', 'w').write('5')"
    cost = bench_sweep.run_process(["-c", script], tmp_path / "log")
    assert cost.peak_bytes > 200_000_000
    assert cost.wall > 0.5


def test_an_end_of_the_script_ends_its_child(tmp_path, monkeypatch):
    pids = []

    def interrupted(process, start):
        pids.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_sweep, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_sweep.run_process(["-c", "import time; time.sleep(60)"], tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_the_script_stays_small():
    """A child's peak counts from its parent's, so the parent must not hold JAX."""
    import subprocess

    code = "import sys, bench_sweep; print(*{'jax', 'lorax', 'torch', 'numpy'} & {*sys.modules})"
    scripts = Path(bench_sweep.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == ""
