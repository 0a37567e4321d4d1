"""Flax NNX encoders and decoders, and the checkpoints they load.

Imports run one way: `options` <- `layers` <- `families` <- `checkpoints`. Above them `classifier`
and `causal_lm` add heads, `build` makes a model without weights, `load` one with a checkpoint's.
"""

from lorax.models.build import abstract_model, load_config
from lorax.models.causal_lm import CausalLM, KVCache
from lorax.models.checkpoints.convert import convert
from lorax.models.checkpoints.reading import load_checkpoint
from lorax.models.checkpoints.source import resolve_source
from lorax.models.checkpoints.tensor_names import hf_module, is_transposed
from lorax.models.classifier import Head, SequenceClassifier
from lorax.models.families import DECODERS, ENCODERS, FAMILIES, family_of
from lorax.models.families.bert import BertConfig
from lorax.models.families.encoder import Encoder
from lorax.models.families.family import dropout_rates
from lorax.models.layers.pooling import Prefix, sum_by_sequence
from lorax.models.layers.quantization import KINDS, Quantized, dequantize, quantize
from lorax.models.layers.token_loss import smoothed_losses
from lorax.models.load import check_checkpoint, load_causal_lm, load_model

__all__ = [
    "DECODERS",
    "ENCODERS",
    "FAMILIES",
    "KINDS",
    "BertConfig",
    "CausalLM",
    "Encoder",
    "Head",
    "KVCache",
    "Prefix",
    "Quantized",
    "SequenceClassifier",
    "abstract_model",
    "check_checkpoint",
    "convert",
    "dequantize",
    "dropout_rates",
    "family_of",
    "hf_module",
    "is_transposed",
    "load_causal_lm",
    "load_checkpoint",
    "load_config",
    "load_model",
    "quantize",
    "resolve_source",
    "smoothed_losses",
    "sum_by_sequence",
]
