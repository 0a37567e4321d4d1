"""Tensors that are tied, doubled or in several shards, against transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import check_checkpoint, load_checkpoint, load_config
from tests.helpers.causal_zoo import load_lm, ragged, torch_logits, write_lm
from tests.helpers.run_model import run

WORDS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
OUTPUT = "lm_head.weight"
INDEX = "model.safetensors.index.json"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_logits_are_theirs(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, mask = ragged()
    want, real = torch_logits(theirs, ids, mask).detach().numpy(), mask.astype(bool)
    got = run(load_lm(folder), ids, mask)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", WORDS)
def test_an_output_layer_unlike_the_tied_embeddings_is_used(tmp_path, model_type, caplog):
    write_lm(tmp_path, model_type, tie_word_embeddings=True)
    words, source = WORDS[model_type], ModelConfig(source=str(tmp_path))
    rewrite(tmp_path, lambda x: x.update({OUTPUT: x[words].copy()}))
    assert load_config(source, is_decoder=True).tie_word_embeddings
    rewrite(tmp_path, lambda x: x.update({OUTPUT: 0.5 * x[words][::-1]}))
    with caplog.at_level("WARNING", "lorax.models.build"):
        assert not load_config(source, is_decoder=True).tie_word_embeddings
        check_checkpoint(source, 0)
    assert [r.message for r in caplog.records if "tie_word_embeddings" in r.message] == [
        f"{tmp_path}: config.json says tie_word_embeddings, but the file's output layer is not the "
        "word embeddings: it is taken as it is"
    ]
    assert_logits_are_theirs(tmp_path)
    rewrite(tmp_path, lambda x: x.update({OUTPUT: np.ones((2, 2), np.float32)}))
    with pytest.raises(LoraxError, match=r"lm_head\.weight has shape \(2, 2\), expected \(61, 24"):
        check_checkpoint(source, 0)


@pytest.mark.parametrize("model_type", WORDS)
def test_a_tied_model_may_keep_the_output_layer_alone(tmp_path, model_type):
    write_lm(tmp_path, model_type, tie_word_embeddings=True)
    rewrite(tmp_path, lambda x: x.update({OUTPUT: x.pop(WORDS[model_type])}))
    assert_logits_are_theirs(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    name = WORDS[model_type].partition(".")[2]
    with pytest.raises(LoraxError, match=f"missing {name}"):
        check_checkpoint(ModelConfig(source=str(tmp_path)), 0)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    write_lm(tmp_path, "gpt2")
    rewrite(tmp_path, lambda x: x.update({"wte.weight": x["transformer.wte.weight"] + 1}))
    with pytest.raises(LoraxError, match=r"twice, as transformer\.wte\.weight and wte\.weight"):
        check_checkpoint(ModelConfig(source=str(tmp_path)), 0)


def test_two_spellings_of_a_norm_are_refused(write_checkpoint, tmp_path, load):
    write_checkpoint()
    old, new = (f"embeddings.LayerNorm.{name}" for name in ("gamma", "weight"))
    rewrite(tmp_path, lambda x: x.update({old: x[new] + 1}))
    with pytest.raises(LoraxError, match=f"{new} is there twice, as .*{old}"):
        load()


@pytest.fixture
def shards(tmp_path):
    """Two shards with `x` in both, and a function that writes their index."""
    for n, more in ((1, "y"), (2, "z")):
        tensors = {name: np.full(2, n, np.float32) for name in ("x", more)}
        save_file(tensors, tmp_path / f"{n}.safetensors")

    def write(weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path

    return write


@pytest.mark.parametrize("shard", [1, 2])
def test_the_index_decides_between_two_shards(shards, shard):
    homes = {"x": f"{shard}.safetensors", "y": "1.safetensors", "z": "2.safetensors"}
    assert load_checkpoint(shards(homes))["x"].tolist() == [shard, shard]


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"y": "1.safetensors", "z": "2.safetensors"}, "x stands in 1.* and in 2.safetensors"),
        ({"x": "1.safetensors", "z": "1.safetensors"}, "1.safetensors lacks z$"),
        ({"x": "3.safetensors"}, "lacks 3.safetensors, which"),
        ({"x": "../1.safetensors"}, "shard '../1.safetensors' is not a file of the same folder"),
        ({"x": "/etc/passwd"}, "'/etc/passwd' is not a file of the same"),
        ({"x": ".."}, "shard '..' is not a file|lacks .."),
        ({"x": ""}, "shard '' is not a file|lacks "),
        ({"x": 3}, "no weight_map of file names"),
        ({"x": None}, "no weight_map of file names"),
        (["x"], "no weight_map of file names"),
        (None, "no weight_map of file names"),
    ],
)
def test_a_wrong_index_is_refused_in_a_line(shards, weight_map, named):
    folder = shards(weight_map)
    with pytest.raises(LoraxError, match=named) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
