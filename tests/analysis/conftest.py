import pytest

from tests.helpers.synthetic_sweep import (
    make_config,
    make_result,
    write_halved_sweep,
    write_sweep,
    write_trial,
)


@pytest.fixture
def sweep(tmp_path):
    """Five ranks, two rates, three seeds, both references; all finished."""
    return write_sweep(tmp_path / "sweep", rates=(5e-4, 1e-3))


@pytest.fixture
def halved_sweep(tmp_path):
    """Half of a pack of twelve cut: a rank wholly, two ranks in part, one not at all."""
    return write_halved_sweep(tmp_path / "halved")


@pytest.fixture
def faulty_sweep(tmp_path):
    """One good rank, a diverged seed, an unfinished trial, broken files of each kind."""
    root = write_sweep(tmp_path / "faulty", ranks=(4, 8), references=())
    diverged = make_config(rank=8, seed=7)
    write_trial(root, "diverged", diverged, make_result(diverged, status="diverged"))
    write_trial(root, "unfinished", make_config(rank=8, seed=8))
    broken = write_trial(root, "broken-result", make_config(rank=8, seed=9))
    (broken / "result.json").write_text('{"status": "fini')
    config = write_trial(root, "broken-config", make_config())
    (config / "config.json").write_text("[]")
    with (root / "reviews-000" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    (root / "report").mkdir()
    return root
