"""The default encoder against its published zero-shot score."""

import csv
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import load_model, resolve_source

DEV = Path(__file__).parents[3] / "shared/glue/STS-B/dev.tsv"


@jax.jit
def mean_pool(hidden_BxTxD, mask_BxT):
    weights = mask_BxT[..., None].astype(hidden_BxTxD.dtype)
    return (hidden_BxTxD * weights).sum(1) / weights.sum(1)


def embed(model, tokenizer, sentences, batch_size=128):
    """Unit vectors of shape (N, D), computed in order of length."""
    encodings = tokenizer.encode_batch(sentences)
    order = np.argsort([len(encoding.ids) for encoding in encodings], kind="stable")
    forward = jax.jit(model.encoder.__call__)
    vectors = np.zeros((len(sentences), model.encoder.config.hidden_size), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = max(len(encodings[row].ids) for row in rows)
        ids = np.zeros((batch_size, -(-longest // 16) * 16), np.int32)
        mask = np.zeros_like(ids)
        mask[:, 0] = 1
        for place, row in enumerate(rows):
            ids[place, : len(encodings[row].ids)] = encodings[row].ids
            mask[place, : len(encodings[row].ids)] = 1
        vectors[rows] = mean_pool(forward(ids, mask), mask)[: len(rows)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_zero_shot_stsb():
    tokenizers = pytest.importorskip("tokenizers")
    try:
        folder = resolve_source("assets/minilm")
    except LoraxError as error:
        pytest.skip(str(error))
    if not DEV.is_file():
        pytest.skip("no STS-B beside the project")
    with DEV.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    model = load_model(ModelConfig(), 1, key=jax.random.key(0))
    first, second = (
        embed(model, tokenizer, [row[column] for row in rows])
        for column in ("sentence1", "sentence2")
    )
    rho = spearmanr((first * second).sum(1), [float(row["score"]) for row in rows]).statistic
    assert rho == pytest.approx(0.8672, abs=5e-4)
