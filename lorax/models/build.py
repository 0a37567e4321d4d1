"""From a `ModelConfig` to a model without weights: its config, its abstract shape."""

import dataclasses
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models.causal_lm import CausalLM
from lorax.models.checkpoints.convert import is_untied
from lorax.models.checkpoints.reading import open_checkpoint
from lorax.models.checkpoints.source import Version, read_json, resolve_source, version_of
from lorax.models.classifier import SequenceClassifier
from lorax.models.families import DECODERS, ENCODERS, family_of
from lorax.models.families.family import with_dropout

log = logging.getLogger(__name__)
Model = SequenceClassifier | CausalLM


def load_config(model: ModelConfig, *, is_decoder: bool = False) -> Any:
    """Reads an architecture; `model.dropout`, if set, replaces all its rates.

    No weights are read, with one exception: where `config.json` ties a decoder's embeddings and the
    files hold an output layer, too, the two are compared. As in transformers, they are not tied if
    they differ.

    Args:
      model: which base.
      is_decoder: whether it has to be one.

    Returns:
      The config of the family that `config.json` names by its `model_type`.

    Raises:
      LoraxError: no such model, one of the other kind, or one with an option that is not served;
        a decoder's weights that are there, but damaged.
    """
    folder = resolve_source(model.source, model.revision)
    try:
        given = read_json(folder / "config.json")
        family = family_of(given.get("model_type", "bert"))
        if family.is_decoder != is_decoder:
            raise LoraxError(_other_kind(given.get("model_type", "bert"), is_decoder))
        if is_decoder and model.pooling != ModelConfig.pooling:
            raise LoraxError(
                f"model.pooling={model.pooling}: a language model has no head that reads pooled "
                f"tokens; leave it at {ModelConfig.pooling}"
            )
        config = family.config.from_hf(given)
        if is_decoder and config.tie_word_embeddings:
            is_tied = not _is_untied(folder, config.model_type, version_of(folder))
            config = dataclasses.replace(config, tie_word_embeddings=is_tied)
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None
    return config if model.dropout is None else with_dropout(config, model.dropout)


@lru_cache(maxsize=8)
def _is_untied(folder: Path, model_type: str, version: Version) -> bool:
    if not any(name.endswith(".safetensors") for name, _ in version):
        return False  # not downloaded yet
    if found := is_untied(open_checkpoint(folder), model_type):
        log.warning(
            "%s: config.json says tie_word_embeddings, but the file's output layer is not the word "
            "embeddings: it is taken as it is",
            folder,
        )
    return found


def _other_kind(model_type: str, is_decoder: bool) -> str:
    if is_decoder:
        kind, needs, served = "an encoder", "a causal language model", DECODERS
    else:
        kind, needs, served = "a decoder", "a classifier", ENCODERS
    return f"model_type={model_type!r} is {kind}; {needs} takes one of: {', '.join(served)}"


def abstract_model(
    model: ModelConfig,
    num_outputs: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Any:
    """The model with `jax.ShapeDtypeStruct`s for parameters: no weights are read or allocated.

    Its graph definition equals that of `load_model` with the same arguments.

    Args:
      model: which base, pooling, attention and dropout.
      num_outputs: classes, or 1 for a regression, of a `SequenceClassifier`; 0: a `CausalLM`.
      dtype: compute dtype of the base.
      param_dtype: storage of the base's parameters.
      remat: compute layers again in the backward pass rather than keep what is in them.

    Raises:
      LoraxError: as `load_config`, or an unknown `pooling` or `attention`.
    """
    config = load_config(model, is_decoder=not num_outputs)
    options: dict[str, Any] = {
        "attention": model.attention,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "remat": remat,
    }

    def make() -> Model:
        rngs = nnx.Rngs(0)
        if not num_outputs:
            return CausalLM(config, **options, rngs=rngs)
        return SequenceClassifier(config, num_outputs, pooling=model.pooling, **options, rngs=rngs)

    return nnx.eval_shape(make)
