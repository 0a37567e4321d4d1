import numpy as np
import pytest
from flax import nnx

from lorax.errors import LoraxError
from lorax.models.causal_lm import CausalLM
from lorax.models.families.gpt2 import Gpt2Config
from tests.helpers.causal_zoo import GPT2, both_sides, load_lm, ragged, torch_logits, write_lm
from tests.helpers.run_model import run

pytestmark = pytest.mark.slow

GIVEN = {"model_type": "gpt2", **GPT2}
VARIANTS = [
    {},
    {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    {"n_head": 1, "scale_attn_weights": False, "tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_logits_equal_transformers(tmp_path, options):
    model = write_lm(tmp_path, "gpt2", **options)
    ids, mask = both_sides()
    want = torch_logits(model, ids, mask).detach().numpy()
    got = run(load_lm(tmp_path), ids, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5)


def test_last_positions_equal_transformers(tmp_path):
    model = write_lm(tmp_path, "gpt2")
    ids, mask = ragged(lengths=(64, 60))
    want = torch_logits(model, ids, mask).detach().numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(
        run(load_lm(tmp_path), ids, mask)[real], want[real], rtol=0, atol=1e-5
    )


def test_xla_attention_equals_einsum(tmp_path):
    write_lm(tmp_path, "gpt2", scale_attn_by_inverse_layer_idx=True)
    ids, mask = ragged()
    real = mask.astype(bool)
    models = [load_lm(tmp_path, attention=name, dropout=0.0) for name in ("xla", "einsum")]
    got, want = (run(model, ids, mask)[real] for model in models)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("site", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_acts_alone(site):
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, site: 0.5}
    model = CausalLM(Gpt2Config.from_hf(GIVEN | rates), rngs=nnx.Rngs(0))
    ids, mask = ragged()
    assert not np.allclose(
        run(model, ids, mask), run(model, ids, mask, rngs=nnx.Rngs(dropout=0)), atol=1e-6
    )


def test_absent_options_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config(**GPT2).to_dict()
    assert Gpt2Config.from_hf(GIVEN) == Gpt2Config.from_hf(theirs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "gptj"),
        ("activation_function", "swiglu"),
        ("add_cross_attention", True),
        ("num_attention_heads", {"n_head": 5}),
        ("n_embd", {"n_embd": None}),
    ],
)
def test_unserved_options_are_refused_by_name(option, value):
    given = value if isinstance(value, dict) else {option: value}
    with pytest.raises(LoraxError, match=option):
        Gpt2Config.from_hf(GIVEN | given)


def test_sequences_beyond_the_positions_are_refused(tmp_path):
    write_lm(tmp_path, "gpt2")
    ids = np.ones((1, 65), np.int32)
    with pytest.raises(LoraxError, match="has 64 positions"):
        run(load_lm(tmp_path), ids, ids)
