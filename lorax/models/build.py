"""From a `ModelConfig` to a model: its config, its abstract shape, its weights."""

import dataclasses
import re
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models.classifier import Head, SequenceClassifier
from lorax.models.convert import convert
from lorax.models.families import ENCODERS, family_of
from lorax.models.family import Family
from lorax.models.hub import load_checkpoint, read_json, resolve_source
from lorax.models.quantization import quantize


def load_config(model: ModelConfig) -> Any:
    """Reads an encoder's architecture, no weights; `model.dropout`, if set, replaces all its rates.

    Returns:
      The config of the family that `config.json` names by its `model_type`.

    Raises:
      LoraxError: no such model, or one with an option that is not served.
    """
    folder = resolve_source(model.source, model.revision)
    try:
        given = read_json(folder / "config.json")
        config = _encoder_family(given.get("model_type", "bert")).config.from_hf(given)
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None
    if (rate := model.dropout) is None:
        return config
    if not 0 <= rate < 1:
        raise LoraxError(f"model.dropout={rate} is not in [0, 1)")
    return dataclasses.replace(
        config, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, classifier_dropout=None
    )


def _encoder_family(model_type: str) -> Family:
    family = family_of(model_type)
    if family.is_decoder:
        raise LoraxError(
            f"model_type={model_type!r} is a decoder; a classifier takes one of: "
            f"{', '.join(ENCODERS)}"
        )
    return family


def abstract_model(
    model: ModelConfig,
    num_outputs: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> SequenceClassifier:
    """The model with `jax.ShapeDtypeStruct`s for parameters: no weights are read or allocated.

    Its graph definition equals that of `load_model` with the same arguments.

    Args:
      model: which base, pooling, attention and dropout.
      num_outputs: classes, or 1 for a regression.
      dtype: compute dtype of the encoder.
      param_dtype: storage of the encoder's parameters.
      remat: compute layers again in the backward pass rather than keep what is in them.

    Raises:
      LoraxError: as `load_config`, or an unknown `pooling` or `attention`.
    """
    config = load_config(model)
    return nnx.eval_shape(
        lambda: SequenceClassifier(
            config,
            num_outputs,
            pooling=model.pooling,
            attention=model.attention,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            rngs=nnx.Rngs(0),
        )
    )


def load_model(
    model: ModelConfig,
    num_outputs: int,
    *,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    quantized: str | None = None,
    remat: bool = False,
    on_host: bool = False,
) -> SequenceClassifier:
    """The model with the checkpoint's weights.

    They are read once a process and shared, never copied, by all models of the same config.

    The head is drawn from `key` alone. With pooling `pooler` the checkpoint's pooler, and its
    output layer where that has `num_outputs` outputs, take the place of what was drawn; the other
    poolings feed the output layer other features than it was trained on, so theirs is fresh.

    Args:
      model: which base, pooling, attention and dropout.
      num_outputs: classes, or 1 for a regression.
      key: draws the fresh head.
      dtype: compute dtype of the encoder.
      param_dtype: storage of the encoder's parameters; the head's stay float32.
      quantized: `int8` or `nf4` for the kernels of the encoder's layers; None: `param_dtype`. For
        `lorax.init` take the shapes of `abstract_model`: a quantized kernel is two arrays.
      remat: as in `abstract_model`.
      on_host: leave the weights as NumPy arrays, to be cut over several devices.

    Raises:
      LoraxError: as `abstract_model`; a checkpoint that is damaged or does not fit.
    """
    folder = resolve_source(model.source, model.revision)
    request = _Request(
        tuple(dataclasses.asdict(model).items()),
        num_outputs,
        jnp.dtype(dtype),
        jnp.dtype(param_dtype),
        quantized,
        remat,
        on_host,
        tuple((file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.*"))),
    )
    graphdef, config, loaded = _load(request)
    head = Head(config, num_outputs, pooling=model.pooling, rngs=nnx.Rngs(params=key))
    params = _flatten({"head": nnx.to_pure_dict(nnx.state(head))})
    return nnx.merge(graphdef, _unflatten(params | loaded))


class _Request(NamedTuple):
    """What decides the weights of a model; the files' times, so that new ones are read."""

    model: tuple[tuple[str, Any], ...]
    num_outputs: int
    dtype: Any
    param_dtype: Any
    quantized: str | None
    remat: bool
    on_host: bool
    files: tuple[tuple[str, int], ...]


@lru_cache(maxsize=2)
def _load(request: _Request) -> tuple[Any, Any, dict[str, Any]]:
    """(graph definition, architecture, the checkpoint's arrays); all trials share the arrays."""
    model = ModelConfig(**dict(request.model))
    abstract = abstract_model(
        model,
        request.num_outputs,
        dtype=request.dtype,
        param_dtype=request.param_dtype,
        remat=request.remat,
    )
    graphdef, state = nnx.split(abstract)
    wanted = _flatten(nnx.to_pure_dict(state))
    config = abstract.encoder.config
    try:
        tensors = load_checkpoint(resolve_source(model.source, model.revision))
        loaded = convert(tensors, wanted, config.model_type, load_head=model.pooling == "pooler")
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None
    return graphdef, config, {p: _stored(p, x, wanted[p], request) for p, x in loaded.items()}


def _stored(path: str, x: np.ndarray, wanted: Any, request: _Request) -> Any:
    place = np.asarray if request.on_host else jnp.asarray
    if request.quantized and re.fullmatch(r"encoder\.layers\..+\.kernel", path):
        return jax.tree.map(place, quantize(x, request.quantized))
    return place(x, wanted.dtype)


def _flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _unflatten(flat: dict[str, Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, name = (int(key) if key.isdigit() else key for key in path.split("."))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
