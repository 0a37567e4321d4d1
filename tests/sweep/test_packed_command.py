"""Packed sweeps as commands: what they say, and what they leave."""

import json
import re

import pytest

pytestmark = pytest.mark.slow

PACKED = ["-m", "hydra/launcher=packed", "train.keep_checkpoints=false"]
GRID = [*PACKED, "optimizer.lr=0.01,0.003", "seed=0,1"]


@pytest.fixture(scope="module")
def said(world, cli, tmp_path_factory):
    """Command lines, run one after another in one process: (folder, what each said)."""
    root = tmp_path_factory.mktemp("commands")
    lines = {
        "plan": world.overrides(root / "plan", *GRID, "sweep.plan=true"),
        "run": world.overrides(root / "run", *GRID),
        "again": world.overrides(root / "run", *GRID),
        "plan after": world.overrides(root / "run", *GRID, "sweep.plan=true"),
        "bad": world.overrides(root / "bad", *PACKED, "lora.rank=1,2,99"),
        "too small": world.overrides(root / "small", *GRID, "sweep.memory_limit_gib=1e-6"),
        "tasks": world.overrides(root / "tasks", *PACKED, "task.name=sst2,mrpc", "seed=0,1"),
        "full": world.overrides(root / "full", *PACKED, "train.mode=full", "seed=0,1"),
    }
    return root, dict(zip(lines, cli(list(lines.values())), strict=True))


def results_in(root):
    return {path.parent.name: path for path in root.glob("tiny/*/result.json")}


def packs_in(root):
    paths = root.glob("tiny/packs/*/pack.json")
    return [json.loads(path.read_text()) for path in paths]


def table_of(out):
    """The plan's rows, by their cells."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_packed_multirun_trains_one_pack_and_tells_of_each_trial(said):
    root, ended = said
    assert (ended["run"]["code"], ended["run"]["err"]) == (0, "")
    results = results_in(root / "run")
    assert len(results) == 4
    (pack,) = packs_in(root / "run")
    assert sorted(pack["trials"]) == sorted(results)
    for name, path in results.items():
        assert ended["run"]["out"].count(f"{name}: accuracy ") == 1
        assert {f.name for f in (path.parent / ".hydra").iterdir()} == {
            "config.yaml",
            "hydra.yaml",
            "overrides.yaml",
        }
        overrides = (path.parent / ".hydra" / "overrides.yaml").read_text()
        seed = re.search(r"-s(\d)-", name)[1]
        assert f"- seed={seed}" in overrides.splitlines()
        assert json.loads(path.read_text())["lanes"] == 4
    assert not list((root / "run").rglob("*.partial"))


def test_the_same_command_again_skips_all(said):
    root, ended = said
    assert (ended["again"]["code"], ended["again"]["err"]) == (0, "")
    assert ended["again"]["out"].count(": accuracy ") == 4
    (pack,) = packs_in(root / "run")
    (record,) = (root / "run").glob("tiny/packs/*/pack.json")
    written = record.stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= written for path in results_in(root / "run").values())
    assert pack["is_over"] is True


def test_a_plan_shows_predicted_figures_and_trains_nothing(said):
    root, ended = said
    assert (ended["plan"]["code"], ended["plan"]["err"]) == (0, "")
    head, _, row = table_of(ended["plan"]["out"])
    cells = dict(zip(head, row, strict=False))
    assert (cells["trials"], cells["rank"], cells["at once"]) == ("4", "2", "4")
    assert (cells["padded"], row.count("")) == ("0%", 0)
    assert all(float(cells[name]) > 0 for name in ("s/step", "seconds"))
    assert re.fullmatch(r"\d+\.\d\d", cells["GiB"])
    assert "4 trials in 1 pack; memory limit " in ended["plan"]["out"]
    table = [line for line in ended["plan"]["out"].splitlines() if line.startswith("|")]
    assert max(map(len, table)) <= 80
    left = {path.name for path in (root / "plan").rglob("*") if path.is_file()}
    assert not left & {"config.json", "metrics.jsonl", "result.json", "pack.json"}


def test_after_a_run_the_plan_shows_what_was_measured(said):
    root, ended = said
    assert ended["plan after"]["code"] == 0
    _, _, before = table_of(ended["plan"]["out"])
    _, _, predicted, row = table_of(ended["plan after"]["out"])
    (pack,) = packs_in(root / "run")
    assert predicted[0] == before[0]  # the same pack, by name
    assert (row[0], row.count("")) == ("measured", 4)
    assert float(row[6]) == pytest.approx(pack["measured"]["seconds_per_step"], rel=0.01)
    assert float(row[7]) == pytest.approx(pack["measured"]["seconds"], rel=0.01)


def test_one_bad_trial_is_one_line_before_anything_trains(said):
    root, ended = said
    assert ended["bad"]["code"] == 2
    (line,) = ended["bad"]["err"].splitlines()
    assert re.match(r"error: .*rank 99.*\(trial sst2-lora-r99-", line)
    left = {path.name for path in (root / "bad").rglob("*") if path.is_file()}
    assert not left & {"config.json", "metrics.jsonl", "result.json", "pack.json"}


def test_a_memory_limit_below_one_trial_is_one_line_before_anything_trains(said):
    root, ended = said
    assert ended["too small"]["code"] == 2
    (line,) = ended["too small"]["err"].splitlines()
    assert line.startswith("error: one trial of tiny needs ")
    assert "sweep.memory_limit_gib" in line
    assert not results_in(root / "small")


def test_trials_of_two_tasks_are_two_packs_and_the_log_says_why(said):
    root, ended = said
    assert (ended["tasks"]["code"], ended["tasks"]["err"]) == (0, "")
    assert "2 programs, as the trials differ in task.name (sst2, mrpc)" in ended["tasks"]["out"]
    packs = packs_in(root / "tasks")
    tasks = {frozenset(name.split("-")[0] for name in pack["trials"]) for pack in packs}
    assert tasks == {frozenset({"sst2"}), frozenset({"mrpc"})}
    assert [len(pack["trials"]) for pack in packs] == [2, 2]
    assert len(results_in(root / "tasks")) == 4


def test_full_fine_tuning_goes_one_trial_after_another(said):
    root, ended = said
    assert (ended["full"]["code"], ended["full"]["err"]) == (0, "")
    reason = "2 programs, as the trials differ in full fine-tuning freezes nothing to share"
    assert reason in ended["full"]["out"]
    results = [json.loads(path.read_text()) for path in results_in(root / "full").values()]
    assert [(r["status"], r["lanes"]) for r in results] == [("finished", 1)] * 2
