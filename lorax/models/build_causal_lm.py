"""From a `ModelConfig` to a causal language model with a checkpoint's weights."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.causal_lm import CausalLM
from lorax.models.convert import convert
from lorax.models.families import DECODERS, family_of
from lorax.models.hub import load_checkpoint, read_json, resolve_source


class Model(Protocol):
    """Which base: a `lorax.config.ModelConfig` is one."""

    source: str
    revision: str | None
    attention: str
    dropout: float | None


def load_causal_lm(
    model: Model,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> CausalLM:
    """The language model with the checkpoint's weights, all of them.

    Args:
      model: which base, attention and dropout; a dropout replaces all the model's rates.
      dtype: compute dtype.
      param_dtype: of the stored parameters.
      remat: compute layers again in the backward pass rather than keep what is in them.

    Raises:
      LoraxError: no such model, one that is no decoder or has an option that is not served; a
        checkpoint that is damaged or does not fit.
    """
    folder = resolve_source(model.source, model.revision)
    try:
        config = _read_config(read_json(folder / "config.json"), model.dropout)
        abstract = nnx.eval_shape(
            lambda: CausalLM(
                config,
                attention=model.attention,
                dtype=dtype,
                param_dtype=param_dtype,
                remat=remat,
                rngs=nnx.Rngs(0),
            )
        )
        graphdef, state = nnx.split(abstract)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
        wanted = {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}
        tensors = load_checkpoint(folder)
        found = convert(tensors, wanted, config.model_type, load_head=False)
    except LoraxError as error:
        raise LoraxError(f"model.source={model.source}: {error}") from None
    arrays = [jnp.asarray(found[path], leaf.dtype) for path, leaf in wanted.items()]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, arrays))


def _read_config(given: dict[str, Any], dropout: float | None) -> Any:
    model_type = given.get("model_type")
    if model_type not in DECODERS:
        raise LoraxError(
            f"config.json: model_type={model_type!r} is no decoder; they are: {', '.join(DECODERS)}"
        )
    config = family_of(model_type).config.from_hf(given)
    if dropout is None:
        return config
    if not 0 <= dropout < 1:
        raise LoraxError(f"model.dropout={dropout} is not in [0, 1)")
    return config.with_dropout(dropout)
