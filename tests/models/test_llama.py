import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.models.causal_lm import CausalLM
from lorax.models.families.llama import FAMILIES, LlamaConfig
from tests.helpers.causal_zoo import LLAMA, both_sides, load_lm, ragged, torch_logits, write_lm
from tests.helpers.run_model import run

SLIDING = {"use_sliding_window": True, "sliding_window": 4}
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-3}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 3, "head_dim": 8}),
    ("qwen2", {}),
    ("qwen2", {**SLIDING, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    ("qwen3", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    model_type, options = variant
    model = write_lm(tmp_path, model_type, **options)
    ids, mask = both_sides()
    want = torch_logits(model, ids, mask).detach().numpy()
    got = run(load_lm(tmp_path), ids, mask)
    assert got.dtype == jnp.float32
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5)


def test_absent_options_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    given = ("head_dim", "num_key_value_heads", "max_position_embeddings")
    sizes = {k: v for k, v in LLAMA.items() if k not in given}
    sizes |= {"num_attention_heads": 32, "hidden_size": 64}
    for model_type in FAMILIES:
        theirs = transformers.AutoConfig.for_model(model_type, **sizes)
        ours = LlamaConfig.from_hf(sizes | {"model_type": model_type})
        assert ours == LlamaConfig.from_hf(theirs.to_dict()), model_type


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "gemma"),
        ("hidden_act", "swiglu"),
        ("partial_rotary_factor", 0.5),
        ("num_key_value_heads", 3),
    ],
)
def test_unserved_options_are_refused_by_name(option, value):
    given = value if isinstance(value, dict) else {option: value}
    with pytest.raises(LoraxError, match=option):
        LlamaConfig.from_hf({"model_type": "llama", **LLAMA, **given})


def test_a_layer_type_that_is_not_served_is_refused():
    for name in ("chunked_attention", "sliding_attention"):
        with pytest.raises(LoraxError, match=name):
            LlamaConfig.from_hf({"model_type": "qwen3", **LLAMA, "layer_types": [name] * 2})


def test_absent_sizes_are_named():
    with pytest.raises(LoraxError, match="no hidden_size"):
        LlamaConfig.from_hf({"model_type": "llama", "vocab_size": 3, "num_hidden_layers": 1})


def test_attention_dropout_acts_and_needs_einsum():
    from flax import nnx

    config = LlamaConfig.from_hf({"model_type": "llama", **LLAMA, "attention_dropout": 0.5})
    model, (ids, mask) = CausalLM(config, rngs=nnx.Rngs(0)), ragged()
    assert not np.allclose(
        run(model, ids, mask), run(model, ids, mask, rngs=nnx.Rngs(dropout=0)), atol=1e-6
    )
    with pytest.raises(LoraxError, match="cannot drop attention"):
        CausalLM(config, attention="xla", rngs=nnx.Rngs(0))


def test_xla_attention_equals_einsum(tmp_path):
    write_lm(tmp_path, "qwen3")
    ids, mask = both_sides()
    real = mask.astype(bool)
    models = (load_lm(tmp_path, attention=name) for name in ("xla", "einsum"))
    got, want = (run(model, ids, mask)[real] for model in models)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.usefixtures("mixed")
def test_norms_and_softmax_are_float32_under_bf16(tmp_path):
    write_lm(tmp_path, "qwen3")
    jaxpr = str(jax.make_jaxpr(load_lm(tmp_path, dtype=jnp.bfloat16))(*ragged()))
    lines = [line for line in jaxpr.splitlines() if " = exp " in line or " = rsqrt " in line]
    assert lines
    assert all("f32" in line and "bf16" not in line for line in lines)
