import json

import pytest

pytestmark = pytest.mark.slow

GRID = ["-m", "lora.rank=1,2", "seed=0,1", "train.pad_rank=2"]


def results(root):
    """Each trial's result file, by directory."""
    return {path.parent.name: path for path in (root / "tiny").glob("*/result.json")}


def times(root):
    return {name: path.stat().st_mtime_ns for name, path in results(root).items()}


@pytest.fixture(scope="module")
def ran(world, cli, tmp_path_factory):
    """A grid and the same again, then more of it with Hydra's own launcher."""
    root = tmp_path_factory.mktemp("multirun")
    first, again = cli([world.overrides(root, *GRID)] * 2)
    before = times(root)
    (more,) = cli([world.overrides(root, *GRID, "seed=0,1,2", "hydra/launcher=basic")])
    return root, first, again, more, before


def test_every_trial_has_a_directory_of_its_own(ran):
    root, first, *_ = ran
    assert (first["code"], first["err"]) == (0, "")
    for name, path in results(root).items():
        config = json.loads((path.parent / "config.json").read_text())
        assert f"-r{config['lora']['rank']}-" in name and f"-s{config['seed']}-" in name
        assert json.loads(path.read_text())["trial_id"] == name
        assert (path.parent / "metrics.jsonl").exists() and (path.parent / "adapter").is_dir()
    assert first["out"].count("trained parameters") == 4


def test_a_second_run_trains_nothing(ran):
    _, _, again, *_ = ran
    assert again["code"] == 0
    assert again["out"].count("is finished, skipped") == 4


def test_hydras_basic_launcher_serves_too_and_trains_what_is_new(ran):
    root, _, _, ended, before = ran
    after = times(root)
    assert ended["code"] == 0, ended["err"]
    assert ended["out"].count("is finished, skipped") == 4
    assert len(before) == 4 and len(after) == 6
    assert {name: time for name, time in after.items() if name in before} == before
    assert sum("-s2-" in name for name in after) == 2
    assert not list(root.rglob("*.partial"))
