"""Whatever is in a model's files, only a `LoraxError` of one line leaves their loaders.

Nothing is compiled: configs, headers and names are read, a few small arrays at most.
"""

import json
import random
import struct

import numpy as np
import pytest
from safetensors.numpy import save

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import FAMILIES, load_checkpoint, load_config, resolve_source
from lorax.models.checkpoints import source as source_module
from lorax.models.checkpoints.convert import find_parameters
from lorax.models.checkpoints.reading import open_checkpoint
from tests.helpers.causal_zoo import GPT2, LLAMA
from tests.helpers.encoders import SMALL
from tests.helpers.mutations import WORD, mutated_bytes, mutated_text, mutated_value

LONGEST = 1500
BERT = {
    **SMALL,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
}
ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 32, "truncate": True}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 3.0, 7.0],
    "original_max_position_embeddings": 16,
}
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "mpnet"), BERT),
    "electra": BERT | {"embedding_size": 12, "summary_activation": "gelu"},
    "distilbert": {"vocab_size": 61, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40},
    "deberta-v2": BERT
    | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    | {"max_relative_positions": -1, "conv_kernel_size": 3, "cls_dropout": 0.1},
    "gpt2": GPT2 | {"n_inner": 30, "activation_function": "gelu_new", "attn_pdrop": 0.1},
    "llama": LLAMA | {"rope_parameters": ROPE, "attention_bias": False, "rms_norm_eps": 1e-6},
    "mistral": LLAMA | {"rope_scaling": LONGROPE, "rope_theta": 1e4, "sliding_window": 4},
    "qwen2": LLAMA | WINDOWS,
    "qwen3": LLAMA | WINDOWS | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


def check(call):
    """Whether the call succeeds; else it is a `LoraxError` of one line, neither long nor empty."""
    try:
        call()
    except LoraxError as error:
        message = str(error)
        assert message, call
        assert len(message.splitlines()) == 1, message
        assert len(message) < LONGEST, message
        return False
    return True


def test_no_family_is_forgotten():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_configs(model_type, tmp_path):
    rng, file = random.Random(model_type), tmp_path / "config.json"
    content = {"model_type": model_type} | CONFIGS[model_type]
    is_decoder = FAMILIES[model_type].is_decoder

    def load():
        config = load_config(ModelConfig(source=str(tmp_path)), is_decoder=is_decoder)
        assert config.max_length >= 1
        if hasattr(config, "rope"):
            config.rope.frequencies(config.head_dim)

    file.write_text(json.dumps(content))
    assert check(load)
    outcomes = []
    for _ in range(150):
        file.write_bytes(mutated_text(content, rng))
        outcomes.append(check(load))
    assert 0 < sum(outcomes) < len(outcomes)


FAULTS = [
    ("num_attention_heads", "4"),
    ("num_attention_heads", 0),
    ("num_attention_heads", True),
    ("num_hidden_layers", 1.5),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 10**6),
    ("hidden_size", 2**63),
    ("hidden_size", [24]),
    ("vocab_size", float("nan")),
    ("layer_norm_eps", float("inf")),
    ("hidden_dropout_prob", 1.0),
    ("hidden_dropout_prob", "0.1"),
    ("hidden_act", ["gelu"]),
    ("model_type", ["bert"]),
    ("pad_token_id", -1),
    ("pad_token_id", 61),
    ("type_vocab_size", {}),
    ("max_position_embeddings", 0),
]


@pytest.mark.parametrize(("option", "value"), FAULTS)
def test_an_option_of_the_wrong_type_or_range_is_named(option, value, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert"} | BERT | {option: value})
    )
    with pytest.raises(LoraxError, match=f"{option}=.* is not"):
        load_config(ModelConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"position_buckets": 1}, "position_buckets=1 is not"),
        ({"position_buckets": 64}, "position_buckets=64 is not from 2 to below"),
        ({"pos_att_type": 5}, "pos_att_type=5 is not a text or a list, each a text"),
        ({"conv_kernel_size": 2}, "conv_kernel_size=2 is no odd"),
    ],
)
def test_deberta_refuses_what_its_distances_cannot_be(config, named):
    with pytest.raises(LoraxError, match=named):
        FAMILIES["deberta-v2"].config.from_hf(CONFIGS["deberta-v2"] | config)


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_weights(tmp_path):
    rng, file = random.Random(0), tmp_path / "model.safetensors"
    names = [f"encoder.layer.0.{name}.weight" for name in ("a", "b", "LayerNorm")]
    data = save({name: np.ones((2, 3), np.float32) for name in names})
    header, body = header_of(data)

    def load():
        tensors = open_checkpoint(tmp_path)
        check(lambda: find_parameters(tensors, {}, "bert", load_head=False))
        load_checkpoint(tmp_path)

    outcomes = []
    for _ in range(300):
        is_header = rng.random() < 0.7
        file.write_bytes(
            with_header(mutated_value(header, rng), body) if is_header else mutated_bytes(data, rng)
        )
        outcomes.append(check(load))
    assert 0 < sum(outcomes) < len(outcomes)


def test_indices(tmp_path):
    rng, index = random.Random(1), tmp_path / "model.safetensors.index.json"
    for shard in "ab":
        (tmp_path / f"{shard}.safetensors").write_bytes(save({shard: np.ones(2, np.float32)}))
    homes = {shard: f"{shard}.safetensors" for shard in "ab"}
    content = {"metadata": {"total_size": 16}, "weight_map": homes}
    outcomes = []
    for _ in range(150):
        index.write_bytes(mutated_text(content, rng))
        outcomes.append(check(lambda: load_checkpoint(tmp_path)))
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize(
    "source", ["", "~nouser/x", WORD, f"assets/{WORD}", f"a/{WORD}", "a\nb", "a\0b", "/", "..", "~"]
)
def test_sources(source, monkeypatch):
    def absent(repo, *_):
        raise LoraxError(f"no {repo}")

    monkeypatch.setattr(source_module, "_download", absent)
    check(lambda: load_config(ModelConfig(source=source)))
    check(lambda: resolve_source(source))
