import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax.errors import LoraxError
from lorax.lora.paths import leaves_by_path
from lorax.train.dataset import load_dataset
from lorax.train.setup import prepare


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


def trained(config):
    leaves = leaves_by_path(prepare(config).trainable)
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def draws(config):
    """What is drawn at random: the rest starts at zero."""
    return {path: leaf for path, leaf in trained(config).items() if leaf.any()}


def test_the_seed_draws_the_adapter_the_head_and_the_dropout(world):
    one, again, other = (world.trial(seed=seed) for seed in (1, 1, 2))
    assert len(draws(one)) == 4 + 1  # A of q and v in two layers, the head's kernel
    for path, leaf in draws(one).items():
        np.testing.assert_array_equal(leaf, draws(again)[path])
        assert not np.isclose(leaf, draws(other)[path]).any(), path
    keys = [jax.random.key_data(prepare(config).dropout_key) for config in (one, again, other)]
    assert (keys[0] == keys[1]).all() and (keys[0] != keys[2]).any()


def test_ranks_targets_and_modes_start_from_the_same_numbers(world):
    small = draws(world.trial(lora={"rank": 1}))
    large = draws(world.trial(lora={"rank": 5, "targets": "qkvo", "alpha": 1.0}))
    assert len(large) == 8 + 1
    for path, leaf in small.items():
        rows = large[path][:1] if path.endswith(".a") else large[path]
        np.testing.assert_array_equal(leaf, rows)
    head = "base.head.out.kernel"
    for mode in ("head", "full"):
        np.testing.assert_array_equal(trained(world.trial(train={"mode": mode}))[head], small[head])


def test_a_sweep_reads_its_task_once(world):
    first, second = world.trial(seed=1), world.trial(seed=2, lora={"rank": 1})
    assert load_dataset(first) is load_dataset(second)
    other = world.trial(task={"max_train_samples": 40})
    assert len(load_dataset(other).train) == 40
    cut = world.trial(train={"grad_accum": 4})
    assert load_dataset(cut).train is load_dataset(first).train


def test_a_trial_starts_from_the_output_layer_whose_labels_are_its_own(world, tmp_path):
    def started(names):
        folder = tmp_path / names[0]
        shutil.copytree(world.source, folder)
        layer = {"classifier.weight": kernel.T.copy(), "classifier.bias": bias}
        save_file(load_file(folder / "model.safetensors") | layer, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        named = {"id2label": dict(enumerate(names)), "label2id": None}
        (folder / "config.json").write_text(json.dumps(config | named))
        model = {"source": str(folder), "pooling": "pooler"}
        return trained(world.trial(task={"name": "sst2"}, model=model))

    kernel, bias = np.arange(64, dtype=np.float32).reshape(32, 2), np.float32([3, 4])
    turned, other = started(("POSITIVE", "NEGATIVE")), started(("entailment", "not_entailment"))
    np.testing.assert_array_equal(turned["base.head.out.kernel"], kernel[:, ::-1])
    np.testing.assert_array_equal(turned["base.head.out.bias"], bias[::-1])
    assert not other["base.head.out.bias"].any()


def test_token_ids_beyond_the_embeddings_are_refused_by_the_largest(world, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(world.source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary.pop("w199")
    vocabulary["w198"] = 300  # one token less, and a hole
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(LoraxError, match=r"token ids up to 300, but the model only 212 embeddings"):
        load_dataset(world.trial(model={"source": str(folder)}))
