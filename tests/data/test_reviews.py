import numpy as np
import pytest

from lorax.data import find_asset, get_task, load_split
from lorax.data.tasks import assets as assets_module
from lorax.data.tasks.reviews import FILE_NAME
from lorax.errors import LoraxError


@pytest.fixture
def asset():
    try:
        return find_asset("reviews")
    except LoraxError as error:
        pytest.skip(str(error))


def test_official_counts(asset):
    splits = {split: load_split("reviews", split) for split in get_task("reviews").splits}
    counts = {split: np.bincount(e.labels).tolist() for split, e in splits.items()}
    assert counts == {"train": [4069, 3978], "dev": [533, 517], "test": [473, 500]}
    texts = [text for examples in splits.values() for text in examples.first]
    assert len(texts) == len(set(texts)) == 10070


def write(folder, *rows):
    (folder / FILE_NAME).write_bytes("\r\n".join(rows).encode())


def test_ratings_become_labels(tmp_path):
    rows = [(2.25, "a"), (0.49, "b"), (-0.5, "c"), (0.5, "d"), (1, "a"), (-3, "e")]
    write(tmp_path, *(f"{i}\t{rating}\t{text}" for i, (rating, text) in enumerate(rows)))
    splits = [load_split("reviews", s, tmp_path) for s in ("train", "dev", "test")]
    found = {t: y for e in splits for t, y in zip(e.first, e.labels.tolist(), strict=True)}
    assert found == {"a": 1, "c": 0, "d": 1, "e": 0}
    assert sum(map(len, splits)) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2\t1.5", ":2: 2 fields, expected id, mean rating and text"),
        ("2\tgood\tx", ":2: rating 'good' is not a number from -4 to 4"),
        ("2\tnan\tx", ":2: rating 'nan'"),
    ],
)
def test_malformed(row, message, tmp_path):
    write(tmp_path, "1\t1.0\tfine", row)
    with pytest.raises(LoraxError, match=message):
        load_split("reviews", "train", tmp_path)


def test_missing(tmp_path, monkeypatch):
    with pytest.raises(LoraxError, match="cannot be read"):
        load_split("reviews", "train", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets_module, "_PROJECT", tmp_path)
    monkeypatch.delenv("LORAX_ASSETS", raising=False)
    with pytest.raises(LoraxError, match=r"python scripts/fetch_assets\.py"):
        load_split("reviews", "train")
    monkeypatch.setenv("LORAX_ASSETS", str(tmp_path / "mine"))
    (tmp_path / "mine" / "reviews").mkdir(parents=True)
    assert find_asset("reviews") == tmp_path / "mine" / "reviews"
