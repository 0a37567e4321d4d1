import sys
from types import SimpleNamespace

import pytest

from lorax.data import get_task, load_split
from lorax.data.tasks import glue as glue_module
from lorax.data.tasks.hub import from_hub, load_hub_split
from lorax.errors import LoraxError


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoraxError, match=r"set task.data_dir to a folder that holds MNLI/train"):
        load_hub_split(get_task("mnli"), "train")


def test_asks_for_the_hubs_names_and_reports_its_faults(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(glue_module, "find_folder", lambda *_: None)
    with pytest.raises(LoraxError, match=r"failed \(no route to host\): set task\.data_dir") as e:
        load_split("mnli", "dev_mismatched")
    assert "\n" not in str(e.value)
    assert asked == [("nyu-mll/glue", "mnli", "validation_mismatched")]


def hub_dataset(columns, names=None):
    datasets = pytest.importorskip("datasets")
    import pyarrow

    table = pyarrow.table(columns)
    features = datasets.Features.from_arrow_schema(table.schema)
    if names:
        features["label"] = datasets.ClassLabel(names=names)
    info = datasets.DatasetInfo(features=features)
    # A given fingerprint, because hashing a new dataset fails with some pyarrow and dill.
    return datasets.Dataset(table, info=info, fingerprint="test")


def test_converts_pairs():
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]}
    names = ["entailment", "neutral", "contradiction"]
    examples = from_hub(get_task("mnli"), hub_dataset(columns, names))
    assert (examples.first, examples.second) == (["a", "b", "c"], ["d", "e", "f"])
    assert examples.labels.tolist() == [0, 1, 2]
    reordered = from_hub(get_task("mnli"), hub_dataset(columns, names[::-1]))
    assert reordered.labels.tolist() == [2, 1, 0]


def test_converts_single_texts_and_scores():
    single = from_hub(get_task("cola"), hub_dataset({"sentence": ["x "], "label": [1], "idx": [0]}))
    assert (single.first, single.second, single.labels.tolist()) == (["x "], None, [1])
    columns = {"sentence1": ["a"], "sentence2": ["b"], "label": [2.5]}
    scores = from_hub(get_task("stsb"), hub_dataset(columns))
    assert scores.labels.dtype == "float32"
    assert scores.labels.tolist() == [2.5]


def test_refuses_unlabelled_and_foreign_splits():
    task = get_task("sst2")
    with pytest.raises(LoraxError, match="this split has no labels"):
        from_hub(task, hub_dataset({"sentence": ["x"], "label": [-1]}))
    with pytest.raises(LoraxError, match="no column 'sentence'"):
        from_hub(task, hub_dataset({"text": ["x"], "label": [1]}))
    with pytest.raises(LoraxError, match="expected"):
        from_hub(task, hub_dataset({"sentence": ["x"], "label": [1]}, ["bad", "good"]))
