import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.config import ModelConfig
from lorax.models import load_model

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
PAD = {"roberta": 1, "xlm-roberta": 1, "camembert": 1}  # elsewhere 0
NAMES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "distilbert": "DistilBert",
}
DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def mixed(strict):
    """For bf16: flax and jax.nn promote inside."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def write_checkpoint(tmp_path):
    """Writes a random checkpoint of `transformers` to `tmp_path` and returns the torch model."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    def write(model_type="bert", *, head=False, **options):
        family, options = NAMES[model_type], SMALL | options
        if model_type == "distilbert":
            options = {DISTILBERT.get(name, name): value for name, value in options.items()}
        config = getattr(transformers, f"{family}Config")(**options)
        torch.manual_seed(0)
        model_class = f"{family}ForSequenceClassification" if head else f"{family}Model"
        model = getattr(transformers, model_class)(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(1.0 if re.search("(?i)layer_?norm.weight$", name) else 0.0, 0.15)
        model.save_pretrained(tmp_path)
        return model

    return write


@pytest.fixture
def load(tmp_path):
    """Loads the checkpoint in `tmp_path`."""

    def load(num_outputs=3, *, seed=0, dtype=jnp.float32, param_dtype=jnp.float32, **options):
        config = ModelConfig(source=str(tmp_path), **options)
        key = jax.random.key(seed)
        return load_model(config, num_outputs, key=key, dtype=dtype, param_dtype=param_dtype)

    return load


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


@pytest.fixture
def batch():
    return make_batch
