"""`scripts/agree_with_peft.py` on a tiny model: lorax trains as PEFT and PyTorch do."""

import argparse
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lorax.errors import LoraxError
from lorax.interop import load_peft
from lorax.models import abstract_model
from lorax.train.dataset import load_dataset

pytest.importorskip("peft")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("agree_with_peft")


RUNS = {  # the first two differ in data alone, and share a compiled step
    "strong decay": {"optimizer": {"lr": 0.01, "weight_decay": 0.5}},
    "no clipping": {"optimizer": {"clip_norm": None, "b2": 0.99, "eps": 1e-3, "warmup_ratio": 0.3}},
    "pairs": {"task": {"name": "mrpc"}, "lora": {"targets": "qkvo", "scaling": "rslora"}},
}


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_outputs_agree_step_by_step(script, world, run):
    # 150 examples in batches of 16: the tenth batch, somewhere, is filled up with weight-0 rows.
    config = world.trial(**RUNS[run])
    config.train.max_steps = 10
    record = script.compare_losses(config)
    np.testing.assert_allclose(record["losses"]["lorax"], record["losses"]["peft"], rtol=1e-4)
    assert len(record["losses"]["peft"]) == 10
    assert record["dev"]["largest_output_difference"] < 1e-3
    assert record["agrees"]


def test_the_trained_weights_agree(script, world, tmp_path):
    config = world.trial(optimizer={"lr": 0.01, "clip_norm": 0.2})
    config.train.max_steps = 8
    dataset = load_dataset(config)
    ours, theirs = script.same_start(config, dataset)
    start = jax.tree.map(np.asarray, ours.state.trainable["lora"])
    for indices in script.batches(config, dataset):
        ours.step(script.batch_for("lorax", dataset, indices))
        theirs.step(script.batch_for("peft", dataset, indices))
    theirs.model.encoder.save_pretrained(tmp_path)
    base = nnx.to_pure_dict(nnx.state(abstract_model(config.model, 2)))
    for path, pair in load_peft(tmp_path, base, "bert").lora.items():
        for part, tensor in ours.state.trainable["lora"][path].items():
            assert np.abs(tensor - start[path][part]).max() > 0.01
            np.testing.assert_allclose(pair[part], tensor, atol=1e-4)
    head = ours.state.trainable["base"]["head"]["out"]
    np.testing.assert_allclose(theirs.model.head.weight.detach().T, head["kernel"], atol=1e-4)
    np.testing.assert_allclose(theirs.model.head.bias.detach(), head["bias"], atol=1e-4)


def options(world, out, **changes):
    values = {"part": "seeds", "task": "sst2", "seeds": 2, "out": out, "table": False}
    return argparse.Namespace(**(values | changes))


@pytest.fixture
def tiny_trials(script, world, monkeypatch, tmp_path):
    """The script's trials, on the tiny world."""
    monkeypatch.setattr(script, "trial", lambda options, seed: world.trial(tmp_path, seed=seed))
    return script


def test_seeds_go_on_where_they_stopped(tiny_trials, world, tmp_path):
    first = tiny_trials.compare_seeds(options(world, tmp_path, seeds=1))
    said = []
    record = tiny_trials.compare_seeds(options(world, tmp_path), report=said.append)
    assert [line.partition(":")[0] for line in said] == ["seed 1 peft", "seed 1 lorax"]
    assert record["peft"]["0"] == first["peft"]["0"]
    assert set(record["lorax"]) == {"0", "1"}


def test_the_table_of_seeds(script):
    def seeds(*values):
        return {str(n): {"best": {"accuracy": x}, "last": {"accuracy": 0.5}} for n, x in values}

    record = {"settings": {"task": {"name": "sst2"}}}
    record |= {"peft": seeds((0, 0.7), (1, 0.72)), "lorax": seeds((0, 0.8), (1, 0.82), (2, 0.1))}
    best, last = importlib.import_module("peft_tables").seed_table([record]).splitlines()[2:]
    assert best.startswith(
        "| sst2 | accuracy | best | 2 | 71.00 ± 1.41 | 81.00 ± 1.41 | +10.00 | [+3.92, +16.08] | no"
    )
    assert last.endswith("| +0.00 | no spread |  |")


def test_figures_of_other_settings_are_refused(tiny_trials, world, tmp_path):
    path = tmp_path / "seeds-sst2.json"
    path.write_text(json.dumps({"settings": {}, "peft": {}, "lorax": {}}))
    with pytest.raises(LoraxError, match="is of other settings"):
        tiny_trials.compare_seeds(options(world, tmp_path))
    path.write_text("{")
    with pytest.raises(LoraxError, match="is damaged"):
        tiny_trials.print_tables(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": {"dropout": 0.1}}, "lora.dropout"),
        ({"lora": {"targets": "mlp"}}, "lora.targets"),
        ({"model": {"pooling": "cls"}}, "model.pooling"),
        ({"optimizer": {"schedule": "cosine"}}, "optimizer.schedule"),
    ],
)
def test_what_is_not_comparable_is_refused(script, world, changes, named):
    with pytest.raises(LoraxError, match=f"does not serve this {named}"):
        script.compare_losses(world.trial(**changes))
