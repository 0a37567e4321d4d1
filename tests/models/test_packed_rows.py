"""Several sequences in a row are computed as each of them alone."""

import numpy as np
import pytest

from lorax.models import BertConfig
from lorax.models.classifier import POOLINGS
from tests.helpers.encoders import (
    NO_DROPOUT,
    encoded_texts,
    outputs_alone,
    outputs_packed,
    random_classifier,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 30,
}


def classifier(model_type, pooling, attention="einsum"):
    config = BertConfig.from_hf({"model_type": model_type, **SIZES, **NO_DROPOUT})
    return random_classifier(config, pooling, attention)


@pytest.mark.parametrize("attention", ["einsum", "xla"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_outputs_are_those_of_a_sequence_a_row(model_type, pooling, attention):
    encoded = encoded_texts(types=1 if model_type == "roberta" else 2)
    model = classifier(model_type, pooling, attention)
    alone = outputs_alone(model, encoded)
    np.testing.assert_allclose(outputs_packed(model, encoded, 0), alone, rtol=1e-5, atol=1e-5)


def test_empty_rows_change_nothing():
    model, encoded = classifier("bert", "mean"), encoded_texts()
    few, many = (outputs_packed(model, encoded, empty) for empty in (0, 5))
    np.testing.assert_allclose(few, many, rtol=1e-6, atol=1e-6)
