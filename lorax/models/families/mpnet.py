"""MPNet encoders (Song et al. 2020), in Flax NNX.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width, H heads, K width of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.models.families import encoder
from lorax.models.families.family import Family, Pooler, Rule, check_sizes, read_config
from lorax.models.layers.functions import ACTIVATIONS
from lorax.models.layers.maker import Maker
from lorax.models.layers.pooling import FirstTokens
from lorax.models.options import Count, Epsilon, Layers, Length, Rate, Size

_PADDING = 1  # in transformers too, whatever its config says
_BUCKETS = 32  # half of them for tokens before, half for those after
_FARTHEST = 128  # tokens from here on share a bucket

# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mpnet",),
    "hidden_act": tuple(ACTIVATIONS),
    "pad_token_id": (_PADDING,),
    "relative_attention_num_buckets": (_BUCKETS,),
}


@dataclass(frozen=True)
class MPNetConfig:
    """The architecture, in the names of MPNet's `config.json`.

    Attributes:
      classifier_dropout: rate before the output layer; None means `hidden_dropout_prob`.
    """

    vocab_size: Length
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    model_type: str = "mpnet"
    hidden_act: str = "gelu"
    max_position_embeddings: Length = 512
    layer_norm_eps: Epsilon = 1e-12
    pad_token_id: Count = _PADDING
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    classifier_dropout: Rate | None = None
    # What `Embeddings` asks, and MPNet has none of.
    embedding_size: ClassVar[None] = None
    type_vocab_size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(self)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MPNetConfig":
        """Reads the dict of a Hugging Face `config.json`.

        Raises:
          LoraxError: an option that changes the computation and is not served here, or a size
            that is absent.
        """
        names: dict[str, tuple[str, ...]] = {"classifier_dropout": ()}  # theirs has no such option
        return cls(**read_config(cls, config, served=_SERVED, names=names))

    @property
    def first_position(self) -> int:
        """The row of the position table that a sequence's first token takes."""
        return self.pad_token_id + 1

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that has position embeddings."""
        return self.max_position_embeddings - self.first_position


class Attention(encoder.Attention):
    """Self-attention with a bias that all layers share."""

    def bias(
        self,
        q_BxTxHxK: jax.Array,
        k_BxSxHxK: jax.Array,
        relation: jax.Array,
        only: FirstTokens | None,
        rngs: nnx.Rngs | None,
    ) -> jax.Array:
        """The relation, (B, H, T, S), or what is asked for of it."""
        del q_BxTxHxK, k_BxSxHxK, rngs
        return relation if only is None else _bias_of(only, relation)


def _bias_of(only: FirstTokens, bias_BxHxTxS: jax.Array) -> jax.Array:
    """What is asked for of the bias: (N, H, 1, S)."""
    _, heads, _, attended = bias_BxHxTxS.shape
    bias_BxTxHS = jnp.swapaxes(bias_BxHxTxS, 1, 2).reshape(
        bias_BxHxTxS.shape[0], -1, heads * attended
    )
    return only.tokens(bias_BxTxHS).reshape(-1, heads, 1, attended)


def _buckets_of_distances() -> np.ndarray:
    """The bucket of each distance in tokens, up to the farthest: each its own, then by logarithm.

    On the host and in float32, since a logarithm that is off by one bit moves a token to another
    bucket.
    """
    distances = np.arange(_FARTHEST + 1)
    buckets = _BUCKETS // 2
    exact = buckets // 2
    part = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    part = part / np.float32(math.log(_FARTHEST / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + part.astype(np.int32), buckets - 1)
    return np.where(distances < exact, distances, far).astype(np.int32)


def relative_buckets(positions_BxT: jax.Array) -> jax.Array:
    """The row of the bias table for each pair of tokens: (B, T, S)."""
    ahead_BxTxS = positions_BxT[:, None, :] - positions_BxT[:, :, None]
    distances_BxTxS = jnp.minimum(jnp.abs(ahead_BxTxS), _FARTHEST)
    after_BxTxS = jnp.where(ahead_BxTxS > 0, _BUCKETS // 2, 0)
    return jnp.asarray(_buckets_of_distances())[distances_BxTxS] + after_BxTxS


class Encoder(encoder.Encoder):
    """An MPNet encoder without a head; see `lorax.models.families.encoder.Encoder`."""

    attention_class = Attention

    def make_embeddings(self, make: Maker) -> None:
        """All modules but the layers."""
        super().make_embeddings(make)
        self.relative_bias = make.embed(_BUCKETS, self.config.num_attention_heads)

    def relation(self, ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> jax.Array:
        """What distances add to the logits of all layers: (B, H, T, S)."""
        if positions_BxT is None:  # of columns: those of real tokens differ as their positions do
            columns_1xT = jnp.arange(ids_BxT.shape[1])[None]
            bias_1xTxSxH = self.relative_bias(relative_buckets(columns_1xT))
            bias_BxTxSxH = jnp.broadcast_to(
                bias_1xTxSxH, (ids_BxT.shape[0], *bias_1xTxSxH.shape[1:])
            )
        else:
            bias_BxTxSxH = self.relative_bias(relative_buckets(positions_BxT))
        return jnp.moveaxis(bias_BxTxSxH, 3, 1)


_OURS = r"encoder\.layers\.(\d+)"
_THEIRS = r"mpnet.encoder.layer.\1"
_RULES = (
    Rule(r"encoder\.embeddings\.(word|position)", r"mpnet.embeddings.\1_embeddings"),
    Rule(r"encoder\.embeddings\.norm", "mpnet.embeddings.LayerNorm"),
    Rule(r"encoder\.relative_bias", "mpnet.encoder.relative_attention_bias"),
    Rule(rf"{_OURS}\.attention\.query", f"{_THEIRS}.attention.attn.q"),
    Rule(rf"{_OURS}\.attention\.key", f"{_THEIRS}.attention.attn.k"),
    Rule(rf"{_OURS}\.attention\.value", f"{_THEIRS}.attention.attn.v"),
    Rule(rf"{_OURS}\.attention\.out", f"{_THEIRS}.attention.attn.o"),
    Rule(rf"{_OURS}\.attention\.norm", f"{_THEIRS}.attention.LayerNorm"),
    Rule(rf"{_OURS}\.mlp\.up", f"{_THEIRS}.intermediate.dense"),
    Rule(rf"{_OURS}\.mlp\.down", f"{_THEIRS}.output.dense"),
    Rule(rf"{_OURS}\.mlp\.norm", f"{_THEIRS}.output.LayerNorm"),
    Rule(r"head\.dense", "classifier.dense"),
    Rule(r"head\.out", "classifier.out_proj"),
)

FAMILIES = {
    "mpnet": Family(
        config=MPNetConfig,
        network=Encoder,
        rules=_RULES,
        prefix="mpnet",
        pooler=Pooler(jnp.tanh, drops_before=True),
        head=("classifier",),
        pad_token=_PADDING,
    ),
}
