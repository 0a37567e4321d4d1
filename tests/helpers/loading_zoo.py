"""A deep decoder, and ways to load it: what the tests of loading share."""

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.config import ModelConfig
from lorax.models import load_model
from tests.helpers.causal_zoo import write_lm

WEIGHTS = "model.safetensors"
DTYPES = {
    "fp32": {},
    "bf16": {"param_dtype": jnp.bfloat16},
    "int8": {"quantized": "int8"},
    "nf4": {"quantized": "nf4"},
}
DEEP = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "num_hidden_layers": 8}
MIB = 2**20


def write_deep(folder):
    """Writes a decoder of which no tensor is more than a thirtieth."""
    write_lm(folder, "llama", **DEEP)


def load(folder, *, num_outputs=0, **options):
    key = jax.random.key(0)
    return load_model(ModelConfig(source=str(folder)), num_outputs, key=key, **options)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))
