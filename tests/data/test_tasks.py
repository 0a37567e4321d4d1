import pytest

from lorax.data import TASKS, get_task
from lorax.errors import LoraxError

DOCUMENTS = ("text", "instructions", "e2e")


def test_official_label_order():
    assert get_task("mnli").labels == ("entailment", "neutral", "contradiction")
    assert get_task("rte").labels == get_task("qnli").labels == ("entailment", "not_entailment")
    assert get_task("wnli").labels == ("not_entailment", "entailment")
    assert get_task("sst2").labels == get_task("reviews").labels == ("negative", "positive")


def test_metrics():
    main = {name: task.metrics[0] for name, task in TASKS.items()}
    assert {main.pop(name) for name in DOCUMENTS} == {"perplexity"}
    assert main.pop("cola") == "matthews"
    assert main.pop("stsb") == "pearson"
    assert set(main.values()) == {"accuracy"}
    assert "f1" in get_task("mrpc").metrics
    assert "f1" in get_task("qqp").metrics


def test_outputs_and_splits():
    outputs = {name: task.num_outputs for name, task in TASKS.items()}
    assert {outputs.pop(name) for name in DOCUMENTS} == {0}
    assert outputs.pop("mnli") == 3
    assert outputs.pop("stsb") == 1
    assert set(outputs.values()) == {2}
    assert get_task("mnli").splits == ("train", "dev_matched", "dev_mismatched")
    assert get_task("reviews").splits == get_task("e2e").splits == ("train", "dev", "test")
    assert get_task("text").splits == get_task("instructions").splits == ("train", "dev")


@pytest.mark.parametrize(
    ("name", "hint"), [("mprc", "did you mean 'mrpc'"), ("SST-2", "'sst2'"), ("zzz", "Known: cola")]
)
def test_unknown_task(name, hint):
    with pytest.raises(LoraxError, match=hint):
        get_task(name)
