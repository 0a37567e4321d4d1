"""MPNet encoders (Song et al. 2020), in Flax NNX.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width, H heads, K width of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.attention import attend, check_attention
from lorax.models.family import Family, Pooler, Rule, read_config
from lorax.models.functions import ACTIVATIONS, dropout
from lorax.models.layers import Maker, PostNormMlp, may_attend, split_heads
from lorax.models.reading import FirstTokens

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

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = "mpnet"
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    pad_token_id: int = _PADDING
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise LoraxError(f"hidden_size={width} is no multiple of num_attention_heads={heads}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MPNetConfig":
        """Reads the dict of a Hugging Face `config.json`.

        Raises:
          LoraxError: an option that changes the computation and is not served here, or a size
            that is absent.
        """
        found = read_config(cls, config, served=_SERVED)
        return cls(**(found | {"classifier_dropout": None}))  # theirs has no such option

    @property
    def first_position(self) -> int:
        """The row of the position table that a sequence's first token takes."""
        return self.pad_token_id + 1

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that has position embeddings."""
        return self.max_position_embeddings - self.first_position


class Embeddings(nnx.Module):
    """Word and position embeddings, summed and normalised."""

    def __init__(self, config: MPNetConfig, make: Maker):
        self.config = config
        self.word = make.embed(config.vocab_size, config.hidden_size)
        self.position = make.embed(config.max_position_embeddings, config.hidden_size)
        self.norm = make.norm(config.hidden_size, eps=config.layer_norm_eps)

    def _positions(self, ids_BxT: jax.Array) -> jax.Array:
        """Of a sequence a row, as rows of the table; they count from the padding id."""
        if ids_BxT.shape[1] > (longest := self.config.max_length):
            raise LoraxError(
                f"sequence of {ids_BxT.shape[1]} tokens: this model has {longest} positions; "
                f"set task.max_length to {longest} or less"
            )
        real_BxT = (ids_BxT != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(real_BxT, axis=1) * real_BxT + self.config.pad_token_id

    def __call__(
        self,
        ids_BxT: jax.Array,
        positions_BxT: jax.Array | None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Looks up token ids and positions; returns (B, T, D)."""
        if positions_BxT is None:
            places_BxT = self._positions(ids_BxT)
        else:
            places_BxT = positions_BxT + self.config.first_position
        x_BxTxD = self.word(ids_BxT).astype(jnp.float32)
        x_BxTxD += self.position(places_BxT).astype(jnp.float32)
        return dropout(self.norm(x_BxTxD), self.config.hidden_dropout_prob, rngs)


class Attention(nnx.Module):
    """Multi-head self-attention with a bias, its residual connection and post-norm."""

    def __init__(self, config: MPNetConfig, implementation: str, make: Maker):
        self.config, self.implementation = config, implementation
        width = config.hidden_size
        self.query = make.linear(width, width)
        self.key = make.linear(width, width)
        self.value = make.linear(width, width)
        self.out = make.linear(width, width)
        self.norm = make.norm(width, eps=config.layer_norm_eps)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        bias_BxHxTxS: jax.Array,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """Mixes tokens along the attended ones of a bool mask; the shape stays, or is `only`'s."""
        heads, implementation = self.config.num_attention_heads, self.implementation
        asked_BxTxD = x_BxTxD
        k_BxSxHxK = split_heads(self.key(x_BxTxD), heads)
        v_BxSxHxK = split_heads(self.value(x_BxTxD), heads)
        if only is not None:
            asked_BxTxD, mask_BxTxS = only.tokens(x_BxTxD), only.tokens(mask_BxTxS)
            k_BxSxHxK, v_BxSxHxK = only.rows(k_BxSxHxK), only.rows(v_BxSxHxK)
            bias_BxHxTxS = _bias_of(only, bias_BxHxTxS)
            implementation = "einsum"  # fused kernels are not made for one query
        y_BxTxHxK = attend(
            split_heads(self.query(asked_BxTxD), heads),
            k_BxSxHxK,
            v_BxSxHxK,
            mask_BxTxS,
            bias_BxHxTxS=bias_BxHxTxS,
            implementation=implementation,
            dropout_rate=self.config.attention_probs_dropout_prob,
            rngs=rngs,
        )
        y_BxTxD = self.out(y_BxTxHxK.reshape(asked_BxTxD.shape))
        return self.norm(asked_BxTxD + dropout(y_BxTxD, self.config.hidden_dropout_prob, rngs))


def _bias_of(only: FirstTokens, bias_BxHxTxS: jax.Array) -> jax.Array:
    """What is asked for of the bias: (N, H, 1, S)."""
    _, heads, _, attended = bias_BxHxTxS.shape
    bias_BxTxHS = jnp.swapaxes(bias_BxHxTxS, 1, 2).reshape(
        bias_BxHxTxS.shape[0], -1, heads * attended
    )
    return only.tokens(bias_BxTxHS).reshape(-1, heads, 1, attended)


class Layer(nnx.Module):
    """One transformer block."""

    def __init__(self, config: MPNetConfig, implementation: str, make: Maker):
        self.attention = Attention(config, implementation, make)
        self.mlp = PostNormMlp(
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            rate=config.hidden_dropout_prob,
            eps=config.layer_norm_eps,
            make=make,
        )

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        bias_BxHxTxS: jax.Array,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """Attention, then feed-forward; the shape stays, or is `only`'s: (N, 1, D)."""
        return self.mlp(self.attention(x_BxTxD, mask_BxTxS, bias_BxHxTxS, rngs, only), rngs)


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


class Encoder(nnx.Module):
    """An MPNet encoder without a head.

    Args:
      config: the architecture.
      attention: `einsum` (plain), or `xla` or `cudnn` of `jax.nn.dot_product_attention`, which
        cannot drop attention probabilities; `cudnn` needs a GPU and bfloat16.
      dtype: of matrix products and activations; LayerNorm statistics and softmax are float32.
      param_dtype: of the stored parameters.
      remat: keep the inputs of layers alone, and compute each once more in the backward pass.
      rngs: its stream `params` draws the parameters, normal(0.02) as Hugging Face does.

    Raises:
      LoraxError: unknown `attention`, or one that cannot apply the config's attention dropout.
    """

    def __init__(
        self,
        config: MPNetConfig,
        *,
        attention: str = "einsum",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        check_attention(attention, config.attention_probs_dropout_prob)
        make = Maker(dtype, param_dtype, rngs)
        self.config, self.remat = config, remat
        self.embeddings = Embeddings(config, make)
        self.relative_bias = make.embed(_BUCKETS, config.num_attention_heads)
        self.layers = nnx.List(
            [Layer(config, attention, make) for _ in range(config.num_hidden_layers)]
        )

    def _bias(self, ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> jax.Array:
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

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        position_ids_BxT: jax.Array | None = None,
        only: FirstTokens | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Encodes a batch, a sequence a row, or several.

        Args:
          input_ids_BxT: int token ids, padded on either side.
          attention_mask_BxT: 0 or False on padding. Tokens of a row attend to those of the same
            number: 1 where a row is one sequence; else sequences are numbered.
          token_type_ids_BxT: of no use: the model has no token types.
          position_ids_BxT: int positions in each sequence, from 0; None: a sequence a row.
          only: what is read of the last layer, if not all: it computes no more than that.
          rngs: stream `dropout` turns dropout on; None is deterministic.

        Returns:
          Hidden states of shape (B, T, D), or (N, 1, D) for `only`, in the compute dtype.

        Raises:
          LoraxError: without `position_ids_BxT`, T exceeds the model's positions.
        """
        del token_type_ids_BxT
        x_BxTxD = self.embeddings(input_ids_BxT, position_ids_BxT, rngs)
        mask_BxTxS = may_attend(attention_mask_BxT)
        bias_BxHxTxS = self._bias(input_ids_BxT, position_ids_BxT)
        call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        *layers, last = self.layers
        for layer in layers:
            x_BxTxD = call(layer, x_BxTxD, mask_BxTxS, bias_BxHxTxS, rngs)
        return call(last, x_BxTxD, mask_BxTxS, bias_BxHxTxS, rngs, only)


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
