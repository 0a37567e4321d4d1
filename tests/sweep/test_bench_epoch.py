"""An epoch's rate: commands, faults, the table, and one tiny epoch of each way."""

import json
import subprocess
import sys
from pathlib import Path

import bench_epoch
import peft_trial
import pytest
from bench_sweep import BenchError, default_data_dir, installed

pytestmark = pytest.mark.slow

HEADER = "index\tsentence1\tsentence2\tlabel\n"
RTE = f"{HEADER}0\tOne .\tTwo .\tnot_entailment\n1\tÉ\u2028f .\tB\tentailment\n"


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def options(tmp_path):
    """Options for data and a base that are there in name only."""
    for split in ("train", "dev"):
        write(tmp_path / f"glue/RTE/{split}.tsv", RTE)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        write(tmp_path / "a base" / name)
    return asked(tmp_path, "--model", tmp_path / "a base", "--data-dir", tmp_path / "glue")


def asked(tmp_path, *words):
    words = ["--tasks", "rte", "--out", tmp_path / "out", *words]
    return bench_epoch.parse([str(word) for word in words])


def run(options, monkeypatch, capsys):
    """What `main` does with these options: exit code and both streams."""
    with monkeypatch.context() as patch:
        patch.setattr(bench_epoch, "parse", lambda _: options)
        code = bench_epoch.main([])
    return code, *capsys.readouterr()


def test_all_ways_are_told_the_same(options, tmp_path):
    scripts = {}
    for way in bench_epoch.WAYS:
        line = bench_epoch.command(way, "rte", options.data_dir, options, tmp_path / way)
        scripts[way] = Path(line[0]).name
        assert Path(line[0]).is_file()
        parser = bench_epoch if way == "lorax" else peft_trial
        found = parser.parse(line[1:])
        assert (found.data_dir, found.model) == (options.data_dir, options.model)
        assert (found.batch_size, found.out) == (32, tmp_path / way)
        if way == "lorax":
            assert found.one
            assert found.tasks == ["rte"]
            continue
        assert (found.task, found.epochs, found.rank, found.lr, found.seed) == (
            "rte",
            1,
            8,
            1e-3,
            0,
        )
        assert found.group_by_length == ("grouped" in way)
    assert set(scripts.values()) == {"bench_epoch.py", "peft_trial.py"}
    assert [way for way, name in scripts.items() if name == "bench_epoch.py"] == ["lorax"]


def test_lorax_trains_the_trial_that_peft_trains(options, tmp_path):
    trial = bench_epoch.lorax_trial(options, tmp_path)
    assert (trial.task.name, trial.task.max_length) == ("rte", peft_trial.MAX_LENGTH)
    assert (trial.train.epochs, trial.train.max_steps, trial.train.batch_size) == (1, None, 32)
    assert (trial.train.precision, trial.train.base_dtype) == ("fp32", "fp32")
    assert trial.train.eval_every is None
    assert (trial.lora.rank, trial.lora.alpha, trial.lora.targets) == (8, 16, "qv")
    assert trial.lora.dropout == trial.model.dropout == 0


def test_peft_reads_rte_as_lorax_does(tmp_path):
    from lorax.data.tasks import TASKS
    from lorax.data.tasks.glue import read_tsv

    write(tmp_path / "train.tsv", RTE)
    theirs = peft_trial.read_split("rte", tmp_path / "train.tsv")
    ours = read_tsv(TASKS["rte"], tmp_path / "train.tsv")
    assert theirs.texts == [ours.first, ours.second]
    assert theirs.labels == ours.labels.tolist() == [1, 0]
    assert peft_trial.TASKS["rte"].metrics == TASKS["rte"].metrics


@pytest.mark.parametrize("most", [1, 2, 9])
def test_the_first_examples_are_kept_and_the_header(most, options, tmp_path):
    root = bench_epoch.shortened("rte", options.data_dir, most, tmp_path / "cut")
    whole = peft_trial.read_split("rte", options.data_dir / "RTE/dev.tsv")
    for split in ("train", "dev"):
        cut = peft_trial.read_split("rte", root / f"RTE/{split}.tsv")
        assert cut.labels == whole.labels[:most]
        assert cut.texts == [texts[:most] for texts in whole.texts]


def stand_in(monkeypatch, rates):
    """Each process leaves a rate of `rates`, in order; what they were given."""
    calls, left = [], list(rates)

    def run_process(line, log, more):
        calls.append((line, more))
        out = Path(line[line.index("--out") + 1])
        rate = left.pop(0)
        if rate is None:
            raise BenchError("exit status 1: no such thing")
        result = {"examples": 2, "examples_per_second": rate, "seconds_setup": 7.25}
        write(out / "result.json", json.dumps(result))

    monkeypatch.setattr(bench_epoch, "run_process", run_process)
    monkeypatch.setattr(bench_epoch, "installed", lambda _: "1")
    return calls


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_better_allocator_counts(options, monkeypatch, capsys):
    calls = stand_in(monkeypatch, [100.0, 10.0, 20.0, 50.0, 25.0])
    code, out, err = run(options, monkeypatch, capsys)
    head, rule, line = cells(out)
    assert code == 0
    assert len(head) == len(rule) == len(line)
    assert line == ["rte", "2", "100.0", "20.0", "50.0", "5.00", "2.00", "7.2"]
    assert [x.partition(":")[0] for x in err.splitlines()] == [
        f"rte, {way}" for way in bench_epoch.WAYS
    ]
    tuned = ["MALLOC_ARENA_MAX" in more for _, more in calls]
    assert tuned == [False, False, True, False, True]


def test_a_failing_way_is_one_line_and_earlier_tasks_are_shown(options, monkeypatch, capsys):
    stand_in(monkeypatch, [1.0] * 6 + [None])
    options.tasks = ["rte", "rte"]
    code, out, err = run(options, monkeypatch, capsys)
    assert code == 2
    assert len(cells(out)) == 3
    assert err.splitlines()[-1] == "error: rte, peft: exit status 1: no such thing"


def test_what_is_missing_is_said_before_work(options, monkeypatch, capsys):
    calls = stand_in(monkeypatch, [])
    monkeypatch.setattr(bench_epoch, "installed", lambda name: None if name == "torch" else "1")
    code, out, err = run(options, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err == "error: torch is not installed: make .venv/ready-test\n"
    (options.model / "tokenizer.json").unlink()
    _, _, err = run(options, monkeypatch, capsys)
    assert err.startswith("error: no ")
    assert err.endswith("tokenizer.json: python scripts/fetch_assets.py minilm\n")
    write(options.model / "tokenizer.json")
    (options.data_dir / "RTE/dev.tsv").unlink()
    _, _, err = run(options, monkeypatch, capsys)
    where = options.data_dir
    assert err == f"error: no RTE/train.tsv and dev.tsv in {where}: name GLUE's root\n"
    assert not calls
    assert not options.out.exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--tasks", "cola,mpc"], "'mpc' is not one of cola, mrpc, rte"),
        (["--max-examples", "0"], "'0' is not a whole number from 1"),
        (["--batch-size", "x"], "'x' is not a whole number from 1"),
    ],
)
def test_words_that_cannot_be_are_refused(words, fault, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_epoch.parse(words)
    assert capsys.readouterr().err.splitlines()[-1].endswith(fault)


def absent():
    """Why a real epoch cannot be had here; None when it can."""
    asked = bench_epoch.parse(["--tasks", "cola"])
    asked.task, asked.data_dir = "cola", default_data_dir("cola")
    packages = [name for name in ("torch", "transformers", "peft") if not installed(name)]
    return f"{packages[0]} is not installed" if packages else peft_trial.missing(asked)


@pytest.mark.parametrize("way", ["lorax", "peft-grouped-malloc"])
def test_an_epoch_of_each_way(way, tmp_path):
    if reason := absent():
        pytest.skip(reason)
    options = bench_epoch.parse(["--tasks", "cola", "--out", str(tmp_path), "--batch-size", "24"])
    data = bench_epoch.shortened("cola", default_data_dir("cola"), 40, tmp_path / "data")
    found = bench_epoch.measure(way, "cola", data, options)
    assert found["examples"] == 40
    assert found["last"]["step"] == 2
    assert found["examples_per_second"] == pytest.approx(40 / found["seconds_steps"], rel=1e-3)
    assert "matthews" in found["last"]["metrics"]
    if way == "lorax":
        assert found["steps"] == 2
        assert found["seconds_setup"] > 0


def test_the_script_starts_light():
    """The process that measures the others holds neither library."""
    code = "import sys, bench_epoch; print(*{'jax', 'lorax', 'torch', 'numpy'} & {*sys.modules})"
    scripts = Path(bench_epoch.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == ""
