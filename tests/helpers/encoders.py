"""What tests of encoders share: random models, several sequences a row."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax import data
from lorax.models import SequenceClassifier
from tests.helpers.run_model import run

LENGTHS = (3, 17, 9, 1, 12, 6, 20, 5)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def random_classifier(config, pooling="mean", attention="einsum", **options):
    """Three outputs and large random weights, biases and tables of distances among them."""
    rng = np.random.default_rng(0)

    def filled(path, leaf):
        is_scale = path[-1].key == "scale"
        return jnp.asarray(rng.normal(float(is_scale), 0.2, leaf.shape), leaf.dtype)

    def make():
        options_ = {"pooling": pooling, "attention": attention, **options}
        return SequenceClassifier(config, 3, **options_, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    params = jax.tree_util.tree_map_with_path(filled, nnx.to_pure_dict(state))
    return nnx.merge(graphdef, params)


def encoded_texts(types=2):
    """Random token ids of `LENGTHS`; the latter half of each of the second type, if any."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 50, n).astype(np.int32) for n in LENGTHS]
    second = [((np.arange(n) > n // 2) * (types > 1)).astype(np.int32) for n in LENGTHS]
    return data.Encoded(ids, second, np.zeros(len(LENGTHS), np.int32))


def outputs_alone(model, encoded, pad=0):
    """A sequence a row, as transformers' own are."""
    padded = data.pad(encoded, np.arange(len(LENGTHS)))
    real = padded["attention_mask"]
    ids = np.where(real, padded["input_ids"], pad)
    alone = np.asarray(run(model, ids, real, padded["token_type_ids"]))
    assert np.ptp(alone, axis=0).min() > 0.05
    return alone


def outputs_packed(model, encoded, empty_rows=1):
    """Several sequences a row."""
    layout = data.choose_layout(encoded.lengths, len(LENGTHS) + 2)
    placed = data.fit(encoded.lengths, layout.row_length)
    assert len(placed) < 5 < len(LENGTHS)
    rows, order = len(placed) + empty_rows, np.arange(len(LENGTHS))
    batch = data.collate(encoded, order, placed, layout, rows=rows)
    outputs = run(
        model,
        batch["input_ids"],
        batch["segment_ids"],
        batch["token_type_ids"],
        position_ids_BxT=batch["position_ids"],
        first_tokens_N=batch["first_tokens"],
    )
    assert jnp.isfinite(outputs).all()
    return np.asarray(outputs)[: len(LENGTHS)]
