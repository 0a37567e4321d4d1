"""`python -m experiments.e2e`, on a tiny decoder and a handful of restaurants."""

import csv
import json

import pytest

from experiments import e2e
from lorax import data
from lorax.errors import LoraxError
from lorax.generation.scores import score_texts
from tests.helpers.causal_zoo import WORDS, write_lm_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    root = tmp_path_factory.mktemp("e2e")
    base = write_lm_base(root / "base", "gpt2")
    for split, name in (("train", "trainset"), ("dev", "devset"), ("test", "testset_w_refs")):
        with (root / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["mr", "ref"])
            for n in range(24 if split == "train" else 6):
                meaning = f"name[{WORDS[n % 3]}], area[{WORDS[n % 2 + 10]}]"
                rows.writerow([meaning, f"{WORDS[n % 3]} w5 w6 {WORDS[20 + n % 2]} w7 ."])
    arguments = [
        f"data={root}",
        "metrics=bleu,nist",
        "model=gpt2",
        f"model.source={base}",
        f"output_dir={root / 'out'}",
        "task.max_length=24",
        "train.epochs=60",
        "optimizer.lr=0.02",
        "lora.targets=all-linear",
        "tracking=none",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(e2e, "SEARCH", {**e2e.SEARCH, "num_beams": 3, "max_new_tokens": 8})
        e2e.main(arguments)
    (kept,) = (root / "out").glob("paper-e2e-gpt2/*/e2e.json")
    return root, arguments, kept


def test_a_text_for_each_meaning_and_its_scores(ran):
    root, _, kept = ran
    references = data.references_by_mr("test", root)
    texts = (kept.parent / "e2e.txt").read_text().splitlines()
    assert len(texts) == len(references) == 6
    scores = json.loads(kept.read_text())["scores"]
    assert scores == score_texts(texts, list(references.values()), ("bleu", "nist"))
    # It has learned them, where a random model scores nothing.
    assert scores["bleu"] > 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": None}, r"give data=<folder>"),
        ({"data": "nowhere"}, r"nowhere.* holds no testset_w_refs\.csv"),
        ({"train.mode": "full"}, r"train\.mode=full leaves no adapter"),
        ({"task.data_dir": "elsewhere"}, r"this command sets task\.data_dir itself"),
        ({"metrics": "bleu,blau"}, r"metrics=.*blau.*: give a list of any of bleu"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(ran, change, match):
    own = dict(argument.split("=", 1) for argument in ran[1]) | change
    with pytest.raises(LoraxError, match=match):
        e2e.main([f"{name}={value}" for name, value in own.items() if value is not None])


def test_a_test_set_that_cannot_be_prompted_is_refused_before_training(ran, monkeypatch):
    monkeypatch.setattr(e2e, "SEARCH", {**e2e.SEARCH, "max_new_tokens": 60})
    with pytest.raises(LoraxError, match=r"\d+ tokens and 60 new ones are above the 64"):
        e2e.main([*ran[1], "seed=1"])
