"""`python -m experiments.style` on a tiny decoder: what it keeps, and what it refuses."""

import json
import logging
import math

import numpy as np
import pytest

from experiments import style
from lorax import data
from lorax.errors import LoraxError
from tests.helpers.causal_zoo import torch_logits, write_lm_base, write_text

pytestmark = pytest.mark.slow

LINE = "w9 w8 w7 w6.\n"


@pytest.fixture(scope="module", autouse=True)
def short_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "SAMPLING", {**style.SAMPLING, "max_new_tokens": 8})
        yield


@pytest.fixture(scope="module")
def ran(short_samples, tmp_path_factory):
    """(the base, the arguments, what was kept) of a run of three epochs."""
    root = tmp_path_factory.mktemp("style")
    base = write_lm_base(root / "base")
    text, plain = write_text(root / "style.txt"), root / "plain.txt"
    plain.write_text(20 * LINE)
    arguments = [
        f"data={text}",
        f"plain={plain}",
        f"model.source={base}",
        f"output_dir={root / 'out'}",
        "task.max_length=24",
        "train.epochs=3",
        "optimizer.lr=0.02",
        "tracking=none",
    ]
    style.main(arguments)
    (kept,) = (root / "out").glob("style-style-*/*/style.json")
    return base, arguments, kept


def test_the_held_out_text_gains_and_the_samples_are_there(ran):
    record = json.loads(ran[2].read_text())
    held_out = record["perplexity"]["held-out text"]
    assert held_out["after"] < 0.7 * held_out["before"]
    assert len(record["samples"]) == style.SAMPLES
    assert all(sample["before"] and sample["after"] for sample in record["samples"])
    report = (ran[2].parent / "style.md").read_text()
    assert f"| held-out text | {held_out['before']:.2f} | {held_out['after']:.2f} |" in report


def test_plain_text_has_the_perplexity_of_transformers(ran):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    base, _, kept = ran
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    ids = np.asarray(data.load_tokenizer(base).encode(20 * LINE).ids)
    total = tokens = 0
    for start in range(0, len(ids), 24):
        block = ids[start : start + 24][None]
        with torch.no_grad():
            logits = torch_logits(model, block, np.ones_like(block))[0, :-1]
        labels = torch.tensor(block[0, 1:], dtype=torch.long)
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    plain = json.loads(kept.read_text())["perplexity"]["plain English"]
    assert plain["tokens"] == tokens
    assert plain["before"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_given_again_nothing_is_trained(ran):
    before, said = ran[2].read_text(), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("lorax")
    logger.addHandler(handler)  # the command sets the root logger's handlers anew
    try:
        style.main([*ran[1]])
    finally:
        logger.removeHandler(handler)
    assert any("finished, skipped" in line for line in said)
    assert json.loads(before)["perplexity"] == json.loads(ran[2].read_text())["perplexity"]


def test_another_text_of_the_same_name_is_another_trial(ran, tmp_path):
    other = tmp_path / "style.txt"
    other.write_text(40 * LINE)
    names = [
        style.trial_of(path, []).sweep.name
        for path in (other, type(other)(ran[1][0].removeprefix("data=")))
    ]
    assert names[0] != names[1] and all(name.startswith("style-style-") for name in names)


def test_a_text_shorter_than_a_block_is_measured_too(ran, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("w1 w2 w3 w4.\nw5 w6 w7.\n")
    own = dict(argument.split("=", 1) for argument in ran[1])
    own |= {"data": text, "train.epochs": 1, "output_dir": tmp_path / "out"}
    style.main([f"{name}={value}" for name, value in own.items()])
    assert "| held-out text |" in capsys.readouterr().out


def test_a_model_too_short_for_a_sample_is_refused_before_training(ran, monkeypatch):
    monkeypatch.setattr(style, "SAMPLING", {**style.SAMPLING, "max_new_tokens": 50})
    with pytest.raises(LoraxError, match="64 positions, and a sample takes 74"):
        style.main([*ran[1], "seed=1"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": None}, r"give data=<file\.txt>"),
        ({"data": "nowhere.txt"}, r"data='nowhere\.txt': no such file"),
        ({"sweep.name": "mine"}, r"sweep\.name=mine: this command sets sweep\.name itself"),
        ({"--multirun": ""}, r"--multirun.*: this command runs one trial"),
        ({"plain": "nowhere.txt"}, r"plain='nowhere\.txt': no such file"),
        ({"train.mode": "full"}, r"train\.mode=full leaves no adapter: take lora"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(ran, change, match):
    own = dict(argument.split("=", 1) for argument in ran[1]) | change
    with pytest.raises(LoraxError, match=match):
        style.main([f"{name}={value}" for name, value in own.items() if value is not None])
