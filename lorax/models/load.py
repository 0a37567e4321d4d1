"""From a `ModelConfig` to a model with a checkpoint's weights."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models.build import abstract_model, load_config
from lorax.models.causal_lm import CausalLM
from lorax.models.checkpoints.convert import find_parameters
from lorax.models.checkpoints.lazy_parameter import LazyParameter
from lorax.models.checkpoints.memory_check import check_memory
from lorax.models.checkpoints.placement import Shardings, place
from lorax.models.checkpoints.reading import open_checkpoint
from lorax.models.checkpoints.source import Version, read_json, resolve_source, version_of
from lorax.models.classifier import Head
from lorax.models.labels import output_order

log = logging.getLogger(__name__)


def load_model(
    model: ModelConfig,
    num_outputs: int,
    *,
    key: jax.Array,
    labels: Sequence[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    quantized: str | None = None,
    remat: bool = False,
    shardings: Shardings | None = None,
    on_host: bool = False,
) -> Any:
    """The model with the checkpoint's weights.

    They are read once a process and shared, never copied, by all models of the same config. One
    weight at a time is read, converted and put where it is kept, so that the host never holds the
    checkpoint as a whole. Whether they fit is told before any weight is read, or downloaded.

    A classifier's head is drawn from `key` alone. With pooling `pooler` the checkpoint's pooler
    takes the place of what was drawn, and so does its output layer where that has the outputs of
    `labels`; a log line says whether it has. The other poolings feed the output layer other
    features than it was trained on, so theirs is fresh. A causal language model has no head: all
    its weights are the checkpoint's.

    Args:
      model: which base, pooling, attention and dropout.
      num_outputs: classes, or 1 for a regression, of a `SequenceClassifier`; 0: a `CausalLM`.
      key: draws the fresh head.
      labels: names of the outputs, in order. The checkpoint's outputs are put into this order by
        the names in its `id2label`; where these are unknown or others, the output layer is fresh.
        Empty: the outputs have no names. None: take a layer of `num_outputs` outputs as it is.
      dtype: compute dtype of the base.
      param_dtype: storage of the base's parameters; a head's stay float32.
      quantized: `int8` or `nf4` for the kernels of the base's layers; None: `param_dtype`. For
        `lorax.init` take the shapes of `abstract_model`: a quantized kernel is two arrays.
      remat: as in `abstract_model`.
      shardings: from the shape of a parameter of the base to the devices that it is cut over
        (`lorax.train.mesh.base_shardings`); each process reads what its own devices hold. One
        function for all calls, lest the weights are read again. None: the default device.
      on_host: leave weights without a sharding as NumPy arrays.

    Raises:
      LoraxError: as `abstract_model`; a base that is larger than the memory; a checkpoint that is
        damaged or does not belong to the config; `quantized` with `shardings`.
    """
    if quantized and shardings:
        raise LoraxError(f"a base in {quantized} is not cut over devices: take bf16, or one device")
    request = _Request(
        tuple(dataclasses.asdict(model).items()),
        num_outputs,
        None if labels is None else tuple(labels),
        jnp.dtype(dtype),
        jnp.dtype(param_dtype),
        quantized,
        remat,
        shardings,
        on_host,
    )
    _architecture(request, version_of(resolve_source(model.source, model.revision)))
    version = version_of(resolve_source(model.source, model.revision, weights=True))
    graphdef, config, _ = _architecture(request, version)  # which the weights may have a part in
    params = _load(request, version)
    if num_outputs:
        head = Head(config, num_outputs, pooling=model.pooling, rngs=nnx.Rngs(params=key))
        params = _flatten({"head": nnx.to_pure_dict(nnx.state(head))}) | params
    return nnx.merge(graphdef, _unflatten(params))


def load_causal_lm(
    model: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> CausalLM:
    """The causal language model with the checkpoint's weights; see `load_model`."""
    options: Any = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return load_model(model, 0, key=jax.random.key(0), **options)


def check_checkpoint(model: ModelConfig, num_outputs: int) -> None:
    """Refuses a checkpoint whose names or shapes do not belong to its config; reads no weights.

    Raises:
      LoraxError: as `load_model`, save for memory.
    """
    load_config(model, is_decoder=not num_outputs)  # refused before its weights are downloaded
    resolve_source(model.source, model.revision, weights=True)
    abstract = abstract_model(model, num_outputs)
    _find(model, abstract.config, _flatten(nnx.to_pure_dict(nnx.state(abstract))))


class _Request(NamedTuple):
    """What decides the weights of a model, beside its files."""

    model: tuple[tuple[str, Any], ...]
    num_outputs: int
    labels: tuple[str, ...] | None
    dtype: Any
    param_dtype: Any
    quantized: str | None
    remat: bool
    shardings: Shardings | None
    on_host: bool


@lru_cache(maxsize=2)
def _architecture(request: _Request, version: Version) -> tuple[Any, Any, dict[str, Any]]:
    """(graph definition, config, parameters' shapes) of a base that fits into the memory."""
    del version  # of the files, so that new ones are read
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
    try:
        check_memory(
            wanted,
            quantized=request.quantized,
            shardings=request.shardings,
            on_host=request.on_host,
        )
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None
    return graphdef, abstract.config, wanted


@lru_cache(maxsize=2)
def _load(request: _Request, version: Version) -> dict[str, Any]:
    """The checkpoint's arrays, which all trials share."""
    model = ModelConfig(**dict(request.model))
    _, config, wanted = _architecture(request, version)
    found = _with_labels(_find(model, config, wanted), model, request.labels)
    options: dict[str, Any] = {
        "quantized": request.quantized,
        "shardings": request.shardings,
        "on_host": request.on_host,
    }
    try:
        return {
            path: place(path, parameter, wanted[path].dtype, **options)
            for path, parameter in found.items()
        }
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None


def _find(model: ModelConfig, config: Any, wanted: dict[str, Any]) -> dict[str, LazyParameter]:
    folder = resolve_source(model.source, model.revision, weights=True)
    load_head = model.pooling == "pooler"
    try:
        tensors = open_checkpoint(folder)
        return find_parameters(tensors, wanted, config.model_type, load_head=load_head)
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None


def _with_labels(
    found: dict[str, LazyParameter], model: ModelConfig, labels: tuple[str, ...] | None
) -> dict[str, LazyParameter]:
    """The weights with the output layer in the order of the labels, or without that layer."""
    if labels is None or model.pooling != "pooler":
        return found
    layer = {path: parameter for path, parameter in found.items() if path.startswith("head.out.")}
    config = read_json(resolve_source(model.source, model.revision) / "config.json")
    order = output_order(config, labels)
    if layer and order:
        log.info("model.source=%s: its output layer is used, matched by label names", model.source)
        return found | {path: dataclasses.replace(p, order=order) for path, p in layer.items()}
    reason = "its label names are not the task's" if layer else "it has none of this size"
    log.info("model.source=%s: the output layer starts fresh, as %s", model.source, reason)
    return {path: parameter for path, parameter in found.items() if path not in layer}


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
