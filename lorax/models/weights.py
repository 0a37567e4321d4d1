"""From a `ModelConfig` to a model with a checkpoint's weights."""

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
from lorax.models.build import abstract_model
from lorax.models.causal_lm import CausalLM
from lorax.models.classifier import Head
from lorax.models.convert import convert
from lorax.models.hub import load_checkpoint, resolve_source
from lorax.models.quantization import quantize


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
) -> Any:
    """The model with the checkpoint's weights.

    They are read once a process and shared, never copied, by all models of the same config.

    A classifier's head is drawn from `key` alone. With pooling `pooler` the checkpoint's pooler,
    and its output layer where that has `num_outputs` outputs, take the place of what was drawn;
    the other poolings feed the output layer other features than it was trained on, so theirs is
    fresh. A causal language model has no head: all its weights are the checkpoint's.

    Args:
      model: which base, pooling, attention and dropout.
      num_outputs: classes, or 1 for a regression, of a `SequenceClassifier`; 0: a `CausalLM`.
      key: draws the fresh head.
      dtype: compute dtype of the base.
      param_dtype: storage of the base's parameters; a head's stay float32.
      quantized: `int8` or `nf4` for the kernels of the base's layers; None: `param_dtype`. For
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
    graphdef, config, params = _load(request)
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
    config = abstract.config
    try:
        tensors = load_checkpoint(resolve_source(model.source, model.revision))
        loaded = convert(tensors, wanted, config.model_type, load_head=model.pooling == "pooler")
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None
    return graphdef, config, {p: _stored(p, x, wanted[p], request) for p, x in loaded.items()}


def _stored(path: str, x: np.ndarray, wanted: Any, request: _Request) -> Any:
    place = np.asarray if request.on_host else jnp.asarray
    if request.quantized and re.fullmatch(r"(en|de)coder\.layers\..+\.kernel", path):
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
