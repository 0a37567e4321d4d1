"""Flax NNX encoders and the checkpoints they load."""

from lorax.models.bert import BertConfig, Encoder, Head, SequenceClassifier
from lorax.models.build import abstract_model, load_config, load_model
from lorax.models.convert import convert, hf_module, is_transposed
from lorax.models.hub import load_checkpoint, resolve_source
from lorax.models.quantization import KINDS, Quantized, dequantize, quantize

__all__ = [
    "KINDS",
    "BertConfig",
    "Encoder",
    "Head",
    "Quantized",
    "SequenceClassifier",
    "abstract_model",
    "convert",
    "dequantize",
    "hf_module",
    "is_transposed",
    "load_checkpoint",
    "load_config",
    "load_model",
    "quantize",
    "resolve_source",
]
