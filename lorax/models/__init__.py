"""Flax NNX encoders and decoders, and the checkpoints they load."""

from lorax.models.bert import BertConfig
from lorax.models.build import abstract_model, load_config
from lorax.models.causal_lm import CausalLM, KVCache
from lorax.models.classifier import Head, SequenceClassifier
from lorax.models.convert import convert, hf_module, is_transposed
from lorax.models.encoder import Encoder
from lorax.models.families import DECODERS, ENCODERS, FAMILIES, family_of
from lorax.models.family import dropout_rates
from lorax.models.hub import load_checkpoint, resolve_source
from lorax.models.quantization import KINDS, Quantized, dequantize, quantize
from lorax.models.reading import sum_by_sequence
from lorax.models.token_loss import smoothed_losses
from lorax.models.weights import check_checkpoint, load_causal_lm, load_model

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
