"""Options of `config.json` that have two spellings, read together as transformers reads them.

All pairs that were considered are in the tables below. `dtype` and `torch_dtype` are not: how the
file stores weights follows from the file.
"""

import json

import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.models import ENCODERS, family_of
from tests.helpers.causal_zoo import GPT2, LLAMA

DISTILBERT = {"vocab_size": 61, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
DEBERTA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
SIZES = {"gpt2": GPT2, "distilbert": DISTILBERT, "deberta-v2": DEBERTA}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
OLD_LENGTH = "original_max_position_embeddings"
ROTARY = [
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 77.0}, "rope_theta": 33.0},
    {"rope_scaling": LINEAR | {"rope_theta": 12.0}, "rope_theta": 33.0},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 77.0}, "rope_theta": 33.0},
    {"rope_scaling": None, "rope_parameters": LINEAR, "rope_theta": 33.0},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 33.0},
    {"rope_parameters": YARN | {OLD_LENGTH: 256}, OLD_LENGTH: 1024},
    {"rope_parameters": YARN, OLD_LENGTH: 1024},
    {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1.0}},
]


def theirs(folder, config):
    transformers = pytest.importorskip("transformers")
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("options", ROTARY)
def test_rotary_options(tmp_path, options):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    sizes = LLAMA | {"head_dim": 32, "max_position_embeddings": 4096}
    config = {"model_type": "llama", **sizes, **options}
    want = modeling.LlamaRotaryEmbedding(theirs(tmp_path, config))
    rope = family_of("llama").config.from_hf(config).rope
    np.testing.assert_allclose(rope.frequencies(32), want.inv_freq.numpy(), rtol=1e-6)
    assert rope.scale == pytest.approx(want.attention_scaling)


@pytest.mark.parametrize(
    ("model_type", "field", "given"),
    [
        # The general name goes before the family's own.
        ("gpt2", "hidden_size", {"hidden_size": 48}),
        ("gpt2", "num_hidden_layers", {"num_hidden_layers": 5}),
        ("gpt2", "num_attention_heads", {"num_attention_heads": 6}),
        ("gpt2", "max_position_embeddings", {"max_position_embeddings": 128}),
        ("distilbert", "hidden_size", {"hidden_size": 48}),
        ("distilbert", "num_hidden_layers", {"num_hidden_layers": 5}),
        ("distilbert", "num_attention_heads", {"num_attention_heads": 6}),
        # Names without effect.
        ("gpt2", "max_position_embeddings", {"n_ctx": 128}),
        ("gpt2", ("intermediate_size", "n_inner"), {"intermediate_size": 99, "n_inner": 48}),
        ("gpt2", ("hidden_act", "activation_function"), {"hidden_act": "relu"}),
        ("distilbert", ("intermediate_size", "hidden_dim"), {"intermediate_size": 99}),
        ("distilbert", ("hidden_act", "activation"), {"hidden_act": "relu"}),
        ("distilbert", ("hidden_dropout_prob", "dropout"), {"hidden_dropout_prob": 0.5}),
        (
            "distilbert",
            ("attention_probs_dropout_prob", "attention_dropout"),
            {"attention_probs_dropout_prob": 0.5},
        ),
        ("distilbert", ("classifier_dropout", "seq_classif_dropout"), {"classifier_dropout": 0.5}),
        (
            "deberta-v2",
            ("classifier_dropout", "cls_dropout"),
            {"classifier_dropout": 0.5, "cls_dropout": 0.25},
        ),
    ],
)
def test_names_of_one_option(tmp_path, model_type, field, given):
    ours, name = field if isinstance(field, tuple) else (field, field)
    config = SIZES[model_type] | {"model_type": model_type} | given
    read = family_of(model_type).config.from_hf(config)
    want = getattr(theirs(tmp_path, config), name)
    assert getattr(read, ours) == want


def test_a_familys_own_name_is_not_needed_beside_the_general_one():
    config = {k: v for k, v in GPT2.items() if k != "n_embd"} | {"hidden_size": 48}
    assert family_of("gpt2").config.from_hf(config | {"n_embd": None}).hidden_size == 48


@pytest.mark.parametrize("model_type", ENCODERS)
def test_absent_options_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    sizes = DISTILBERT if model_type == "distilbert" else DEBERTA
    config = transformers.AutoConfig.for_model(model_type, **sizes).to_dict()
    read = family_of(model_type).config.from_hf
    assert read(sizes | {"model_type": model_type}) == read(config)


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    "given",
    [
        SLIDING,
        SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
        SLIDING | {"layer_types": ["attention", "sliding_attention"]},
        SLIDING | {"layer_types": None},
    ],
)
def test_layer_types_go_before_max_window_layers(tmp_path, given):
    config = {"model_type": "qwen3", **LLAMA, **given}
    want = theirs(tmp_path, config).layer_types
    windows = family_of("qwen3").config.from_hf(config).windows
    assert windows == tuple(4 if name == "sliding_attention" else None for name in want)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("types", [[], ["full_attention"], ["full_attention"] * 3])
def test_layer_types_are_one_for_each_layer(model_type, types):
    config = {"model_type": model_type, **LLAMA, "layer_types": types}
    with pytest.raises(LoraxError, match=f"{len(types)} entries for num_hidden_layers=2"):
        family_of(model_type).config.from_hf(config)
