"""A GGUF file becomes the same model and tokenizer, by transformers' account and the definition."""

import json

import jax
import numpy as np
import pytest
from gguf_to_hf import main
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lorax.config import ModelConfig
from lorax.data import load_tokenizer
from lorax.models import load_causal_lm
from tests.helpers.gguf_zoo import (
    CORPUS,
    SIZES,
    TEMPLATE,
    plain_bpe,
    random_llama,
    stored_tensors,
    vocabulary,
    write_gguf,
)

IDS = np.random.default_rng(0).integers(3, 300, (2, 9))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    return random_llama(tied=request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model."""
    folder = tmp_path_factory.mktemp("gguf")
    source = write_gguf(folder / "small.gguf", random_llama(tied=True))
    assert main([str(source), str(folder)]) == 0
    return folder


def converted(tmp_path, model, kind):
    source = write_gguf(tmp_path / "small.gguf", model, kind)
    assert main([str(source), str(tmp_path / "hf")]) == 0
    return tmp_path / "hf"


def test_float32_comes_back_bit_for_bit(tmp_path, model):
    weights = load_file(converted(tmp_path, model, "F32") / "model.safetensors")
    want = {name: weight.numpy() for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del want["lm_head.weight"]
    assert weights.keys() == want.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, want[name])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_few_bits_become_what_transformers_reads(tmp_path, model, kind):
    weights = load_file(converted(tmp_path, model, kind) / "model.safetensors")
    theirs = type(model).from_pretrained(tmp_path, gguf_file="small.gguf").state_dict()
    for name, array in weights.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name].numpy())
    changed = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    assert 0 < np.abs(weights["model.layers.0.self_attn.q_proj.weight"] - changed).max() < 0.1


def test_logits_equal_the_torch_models(tmp_path, model):
    torch = pytest.importorskip("torch")
    want = model(torch.tensor(IDS)).logits.detach().numpy()
    ours = load_causal_lm(ModelConfig(source=str(converted(tmp_path, model, "F32"))))
    got = jax.jit(ours)(IDS.astype(np.int32), np.ones(IDS.shape, np.int32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_config_is_the_torch_models(folder):
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in SIZES} == SIZES
    read = transformers.AutoConfig.from_pretrained(folder)
    assert read.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}
    assert (read.head_dim, read.vocab_size) == (16, len(vocabulary()[0]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*CORPUS[0].split(" "), "  ", "\n", " 12", "½", "é"]) | st.text()))
def test_tokens_follow_the_definition(folder, words):
    text = " ".join(words)
    tokenizer = load_tokenizer(folder)
    if not any(token in text for token in vocabulary()[0][:3]):
        ids = tokenizer.encode(text).ids
        assert ids == plain_bpe(text, *vocabulary())
        assert tokenizer.decode(ids) == text


def test_digits_stand_alone_and_special_tokens_are_one(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids[:: len("xx")] == [1, 2]
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


def test_the_chat_template_comes_along(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "the cat"}]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: the cat"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("the cat").input_ids == plain_bpe("the cat", *vocabulary())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture='qwen2' is not served; llama is"),
        ({"llama__block_count": None}, "no llama.block_count"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type: not served"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count=8: served are whole"),
        ({"tokenizer__ggml__pre": "qwen2"}, "tokenizer.ggml.pre='qwen2' is not served; smollm is"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model='llama' is not served"),
        ({"tokenizer__ggml__add_bos_token": True}, "add_bos_token=True is not served; False is"),
        ({"tokenizer__ggml__merges": None}, "no tokenizer.ggml.tokens, merges and token_type"),
        ({"tokenizer__ggml__merges": ["t zzz"]}, "tokenizer.ggml.merges: "),
        ({"tokenizer__ggml__merges": ["t"]}, "tokenizer.ggml.merges: "),
        ({"tokenizer__ggml__eos_token_id": 999}, "eos_token_id=999 is none of 320 tokens"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope_freqs.weight: no place"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "blk.1.ffn_up.weight: absent"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, capsys, changes, message):
    source = write_gguf(tmp_path / "small.gguf", random_llama(tied=True), **changes)
    assert main([str(source), str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: small.gguf: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kept", [0, 3, 20, 1000, 100_000])
def test_a_damaged_file_is_told(folder, tmp_path, capsys, kept):
    data = (folder / "small.gguf").read_bytes()
    assert kept < len(data)
    (tmp_path / "cut.gguf").write_bytes(data[:kept])
    assert main([str(tmp_path / "cut.gguf"), str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cut.gguf is damaged or no GGUF file (")
    assert error.count("\n") == 1
    assert not (tmp_path / "hf").exists()


def test_an_absent_file_is_told(tmp_path, capsys):
    assert main([str(tmp_path / "no.gguf"), str(tmp_path)]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_zoo_stores_heads_by_pairs():
    model = random_llama(tied=True)
    stored = stored_tensors(model)["blk.0.attn_q.weight"]
    rows = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(stored[:4], rows[[0, 8, 1, 9]])
