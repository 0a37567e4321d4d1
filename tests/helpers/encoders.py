"""What tests of encoders share: checkpoints in both libraries, several sequences a row."""

import contextlib
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax import data
from lorax.config import ModelConfig
from lorax.models import SequenceClassifier, load_model
from tests.helpers.run_model import quick_jit, run

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
PAD = {"roberta": 1, "xlm-roberta": 1, "camembert": 1, "mpnet": 1}  # elsewhere 0
NAMES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "deberta-v2": "DebertaV2",
}
DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
LENGTHS = (3, 17, 9, 1, 12, 6, 20, 5)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@contextlib.contextmanager
def strictly():
    """JAX promotes neither ranks nor types by itself."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def write_encoder(folder, model_type="bert", *, head=False, **options):
    """Writes a random checkpoint of `transformers` and returns the torch model."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    family, options = NAMES[model_type], SMALL | options
    if model_type == "distilbert":
        options = {DISTILBERT.get(name, name): value for name, value in options.items()}
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    kind = f"{family}ForSequenceClassification" if head else f"{family}Model"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if re.search("(?i)layer_?norm.weight$", name) else 0.0, 0.15)
    model.save_pretrained(folder)
    return model


def load_classifier(
    folder, num_outputs=3, *, seed=0, dtype=jnp.float32, param_dtype=jnp.float32, **options
):
    config, key = ModelConfig(source=str(folder), **options), jax.random.key(seed)
    return load_model(config, num_outputs, key=key, dtype=dtype, param_dtype=param_dtype)


def make_batch(model_type="bert", *, side="right", types=2, lengths=(9, 4, 1, 7)):
    """Ragged numpy batch: ids, mask, token types, each of shape (B, T)."""
    rng = np.random.default_rng(1)
    count, longest = len(lengths), max(lengths)
    column = np.arange(longest)[None]
    length = np.array(lengths)[:, None]
    mask = column < length if side == "right" else column >= longest - length
    ids = np.where(mask, rng.integers(4, 60, (count, longest)), PAD.get(model_type, 0))
    segments = rng.integers(0, types, (count, longest)) * mask
    return ids.astype(np.int32), mask.astype(np.int32), segments.astype(np.int32)


class Compared(NamedTuple):
    """A checkpoint with a head of three outputs in both libraries, and what they make of a batch.

    Attributes:
      theirs: the torch model.
      ours: the same weights here.
      real: where the batch has tokens; its rows are padded on the right, and again on the left.
      hidden: (theirs, ours), hidden states after the last layer.
      logits: (theirs, ours).
    """

    theirs: Any
    ours: SequenceClassifier
    real: np.ndarray
    hidden: tuple[np.ndarray, np.ndarray]
    logits: tuple[np.ndarray, np.ndarray]


def compare(folder, model_type, options, *, inputs=3, **shape):
    """Build a variant of a family once, for all that is asserted of it.

    Args:
      folder: for the checkpoint.
      model_type: of the family.
      options: of its config.
      inputs: how many of ids, mask and token types the torch model takes.
      **shape: of `make_batch`.
    """
    torch = pytest.importorskip("torch")
    theirs = write_encoder(folder, model_type, head=True, num_labels=3, **options)
    sides = [make_batch(model_type, side=side, **shape) for side in ("right", "left")]
    arrays = [np.concatenate(pair) for pair in zip(*sides, strict=True)][:inputs]
    names = ("input_ids", "attention_mask", "token_type_ids")[:inputs]
    tensors = [torch.tensor(x, dtype=torch.long) for x in arrays]
    with torch.no_grad():
        given = dict(zip(names, tensors, strict=True))
        out = theirs(**given, output_hidden_states=True)
    with strictly():
        ours = load_classifier(folder, pooling="pooler")
        hidden, logits = _hidden_and_logits(*nnx.split(ours), arrays)
    return Compared(
        theirs,
        ours,
        arrays[1].astype(bool),
        (out.hidden_states[-1].numpy(), np.asarray(hidden)),
        (out.logits.numpy(), np.asarray(logits)),
    )


@partial(quick_jit, static_argnums=0)
def _hidden_and_logits(graphdef, state, arrays):
    model = nnx.merge(graphdef, state)
    return model.encoder(*arrays), model(*arrays)


def dropout_draws(model, arrays):
    """How many dropout masks a forward pass draws."""

    @quick_jit
    def count():
        rngs = nnx.Rngs(dropout=0)
        model(*arrays, rngs=rngs)
        return rngs.dropout.count[...]

    return int(count())


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
