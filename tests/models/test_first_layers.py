"""A network that is given the outputs of its first layers computes what it does from tokens."""

import jax
import numpy as np
import pytest
from flax import nnx

from lorax.models import BertConfig
from lorax.models.families.deberta import DebertaConfig
from lorax.models.families.mpnet import MPNetConfig
from tests.helpers.encoders import NO_DROPOUT, make_batch, random_classifier

SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 30,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
CONFIGS = {
    "bert": (BertConfig, {"model_type": "bert"}),
    "mpnet": (MPNetConfig, {"model_type": "mpnet"}),
    "deberta": (DebertaConfig, {"model_type": "deberta-v2", **RELATIVE}),
    "convolution": (
        DebertaConfig,
        {"model_type": "deberta-v2", "conv_kernel_size": 3, "conv_act": "gelu", **RELATIVE},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_given_the_first_layer_the_logits_are_the_same(name):
    kind, options = CONFIGS[name]
    model = random_classifier(kind.from_hf({**SIZES, **NO_DROPOUT, **options}), pooling="cls")
    graphdef, state = nnx.split(model)

    @jax.jit
    def both(state, ids, mask):
        model = nnx.merge(graphdef, state)
        prefix = model.encoder.first_layers(1, ids, mask)
        nothing = jax.numpy.zeros_like(ids) + 2  # what is read of the tokens no longer counts
        given = model(nothing, mask, prefix=prefix)
        return model(ids, mask), given, model.head.classify(model.features(ids, mask))

    ids, mask = make_batch(types=1)[:2]
    whole, given, from_features = both(state, ids, mask)
    np.testing.assert_allclose(given, whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(from_features, whole, rtol=1e-6, atol=1e-6)
    assert np.ptp(np.asarray(whole), axis=0).min() > 0.01
