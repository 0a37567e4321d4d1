"""Several sequences in a row are computed as each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax import data
from lorax.models import BertConfig, SequenceClassifier
from lorax.models.classifier import POOLINGS

LENGTHS = (3, 17, 9, 1, 12, 6, 20, 5)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 30,
}


def classifier(model_type, pooling, attention="einsum"):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig.from_hf({"model_type": model_type, **SIZES, **rates})
    rngs = nnx.Rngs(0)
    model = SequenceClassifier(config, 3, pooling=pooling, attention=attention, rngs=rngs)
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    large = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, large))


@pytest.fixture
def encoded():
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 50, n).astype(np.int32) for n in LENGTHS]
    types = [(np.arange(n) > n // 2).astype(np.int32) for n in LENGTHS]
    return data.Encoded(ids, types, np.zeros(len(LENGTHS), np.int32))


def packed_outputs(model, encoded, rows=None):
    layout = data.choose_layout(encoded.lengths, len(LENGTHS) + 2)
    order = np.arange(len(LENGTHS))
    placed = data.fit(encoded.lengths, layout.row_length)
    assert len(placed) < 5 < len(LENGTHS)
    batch = data.collate(encoded, order, placed, layout, rows=rows or len(placed))
    outputs = model(
        batch["input_ids"],
        batch["segment_ids"],
        batch["token_type_ids"],
        position_ids_BxT=batch["position_ids"],
        first_tokens_N=batch["first_tokens"],
    )
    assert jnp.isfinite(outputs).all()
    return np.asarray(outputs)[: len(LENGTHS)]


@pytest.mark.parametrize("attention", ["einsum", "xla"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_outputs_are_those_of_a_sequence_a_row(encoded, model_type, pooling, attention):
    if model_type == "roberta":  # one token type
        encoded = data.Encoded(encoded.input_ids, [0 * t for t in encoded.token_type_ids],
                               encoded.labels)  # fmt: skip
    model = classifier(model_type, pooling, attention)
    padded = data.pad(encoded, np.arange(len(LENGTHS)))  # as transformers' own, see test_bert
    inputs = (padded[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    alone = np.asarray(model(*inputs))
    assert np.ptp(alone, axis=0).min() > 0.05
    np.testing.assert_allclose(packed_outputs(model, encoded), alone, rtol=1e-5, atol=1e-5)


def test_empty_rows_change_nothing(encoded):
    model = classifier("bert", "mean")
    few, many = packed_outputs(model, encoded), packed_outputs(model, encoded, rows=9)
    np.testing.assert_allclose(few, many, rtol=1e-6, atol=1e-6)
