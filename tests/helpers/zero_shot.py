"""Zero-shot scores of sentence encoders: how well the cosines of their vectors follow ratings."""

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from lorax import data
from lorax.config import ModelConfig
from lorax.data.tasks.glue import find_folder
from lorax.errors import LoraxError
from lorax.models import load_model, resolve_source

MAX_LENGTH = 128


@jax.jit
def mean_pool(hidden_BxTxD, mask_BxT):
    weights = mask_BxT[..., None].astype(hidden_BxTxD.dtype)
    return (hidden_BxTxD * weights).sum(1) / weights.sum(1)


def embed(model, sentences, batch_size=128):
    """Unit vectors of shape (N, D), computed in order of length."""
    order = np.argsort(sentences.lengths, kind="stable")
    config = model.encoder.config
    forward = jax.jit(model.encoder.__call__)
    vectors = np.zeros((len(sentences), config.hidden_size), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = sentences.lengths[rows].max()
        ids = np.full((batch_size, -(-longest // 16) * 16), config.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
        mask[:, 0] = 1
        for place, row in enumerate(rows):
            ids[place, : sentences.lengths[row]] = sentences.input_ids[row]
            mask[place, : sentences.lengths[row]] = 1
        vectors[rows] = mean_pool(forward(ids, mask), mask)[: len(rows)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stsb_spearman(source):
    """Spearman's correlation on STS-B's dev set; skips the test where something is absent."""
    try:
        folder = resolve_source(source)
    except LoraxError as error:
        pytest.skip(str(error))
    if find_folder(data.get_task("stsb")) is None:
        pytest.skip("no STS-B beside the project, nor in LORAX_GLUE_DIR")
    pairs = data.load_split("stsb", "dev")
    model = load_model(ModelConfig(source=source), 1, key=jax.random.key(0))
    texts = data.Examples([*pairs.first, *pairs.second], None, np.tile(pairs.labels, 2))
    vectors = embed(model, data.encode(data.load_tokenizer(folder), texts, max_length=MAX_LENGTH))
    cosines = np.prod(np.split(vectors, 2), axis=0).sum(1)
    return spearmanr(cosines, pairs.labels).statistic
