"""BERT and RoBERTa encoders with a sequence-level head, in Flax NNX.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width, H heads, K width of a head,
N sequences (B of them, or more when several share a row), C outputs of the head.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.attention import attend
from lorax.models.dense import Dense
from lorax.models.functions import dropout, gelu

POOLINGS = ("mean", "cls", "pooler")
ATTENTIONS = ("einsum", "xla", "cudnn")


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
_PAD_TOKEN = {"bert": 0, "roberta": 1}
# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(_PAD_TOKEN),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "hidden_act": tuple(ACTIVATIONS),
    "pruned_heads": ({},),
}


@dataclass(frozen=True)
class BertConfig:
    """The architecture, in the names of a Hugging Face `config.json`.

    Attributes:
      model_type: `bert`, or `roberta`, whose positions count from the padding id and whose head
        drops features before the pooler's dense layer too.
      classifier_dropout: rate before the output layer; None means `hidden_dropout_prob`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = "bert"
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise LoraxError(f"hidden_size={width} is no multiple of num_attention_heads={heads}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads the dict of a Hugging Face `config.json`.

        Raises:
          LoraxError: an option that changes the computation and is not served here, or a size
            that is absent.
        """
        config = {k: v for k, v in config.items() if v is not None}
        for option, served in _SERVED.items():
            if config.get(option, served[0]) not in served:
                known = ", ".join(map(str, served))
                raise LoraxError(f"config.json: {option}={config[option]!r} is not one of: {known}")
        needed = [f.name for f in fields(cls) if f.default is MISSING]
        if absent := [name for name in needed if name not in config]:
            raise LoraxError(f"config.json: no {', '.join(absent)}; is it a BERT or a RoBERTa?")
        known_fields = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        pad = _PAD_TOKEN[config.get("model_type", "bert")]
        return cls(**({"pad_token_id": pad} | known_fields))

    @property
    def first_position(self) -> int:
        """The row of the position table that a sequence's first token takes."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that has position embeddings."""
        return self.max_position_embeddings - self.first_position


_kernel_init = nnx.initializers.normal(0.02)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; statistics in float32, output in `dtype`."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Normalises; the shape stays."""
        x = x_BxTxD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)


class _Factory:
    """Makes the layers of one encoder: they share initialisers, dtypes and the rng."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, param_dtype: DTypeLike, rngs):
        # One spelling of a dtype, so that graph definitions compare equal.
        dtype, param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)
        self.linear = functools.partial(
            Dense,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=_kernel_init,
            rngs=rngs,
        )
        # Rows are gathered as stored: casting the whole table every step would cost more.
        self.embed = functools.partial(
            nnx.Embed, param_dtype=param_dtype, embedding_init=_kernel_init, rngs=rngs
        )
        self.norm = functools.partial(
            LayerNorm,
            config.hidden_size,
            eps=config.layer_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: BertConfig, make: _Factory):
        self.config = config
        self.word = make.embed(config.vocab_size, config.hidden_size)
        self.position = make.embed(config.max_position_embeddings, config.hidden_size)
        self.token_type = make.embed(config.type_vocab_size, config.hidden_size)
        self.norm = make.norm()

    def _positions(self, ids_BxT: jax.Array) -> jax.Array:
        """Of a sequence a row, as rows of the table."""
        if ids_BxT.shape[1] > (longest := self.config.max_length):
            raise LoraxError(
                f"sequence of {ids_BxT.shape[1]} tokens: this model has {longest} positions; "
                f"set task.max_length to {longest} or less"
            )
        if self.config.model_type == "roberta":
            real_BxT = (ids_BxT != self.config.pad_token_id).astype(jnp.int32)
            return jnp.cumsum(real_BxT, axis=1) * real_BxT + self.config.pad_token_id
        return jnp.broadcast_to(jnp.arange(ids_BxT.shape[1])[None], ids_BxT.shape)

    def __call__(
        self,
        ids_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Looks up token ids, token types (None: all 0) and positions; returns (B, T, D)."""
        if positions_BxT is None:
            places_BxT = self._positions(ids_BxT)
        else:
            places_BxT = positions_BxT + self.config.first_position
        types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
        x_BxTxD = self.word(ids_BxT).astype(jnp.float32)
        x_BxTxD += self.token_type(types_BxT).astype(jnp.float32)
        x_BxTxD += self.position(places_BxT).astype(jnp.float32)
        return dropout(self.norm(x_BxTxD), self.config.hidden_dropout_prob, rngs)


class FirstTokens(NamedTuple):
    """Asks for the first token of each sequence alone; its place in the rows laid end to end.

    None where each row is a sequence.
    """

    first_N: jax.Array | None

    def tokens(self, x_BxTxD: jax.Array) -> jax.Array:
        """What is asked for, of states or masks: (N, 1, D)."""
        if self.first_N is None:
            return x_BxTxD[:, :1]
        return x_BxTxD.reshape(-1, x_BxTxD.shape[-1])[self.first_N][:, None]

    def rows(self, x_BxSxHxK: jax.Array) -> jax.Array:
        """The rows that they lie in: (N, S, H, K)."""
        if self.first_N is None:
            return x_BxSxHxK
        rows, tokens = x_BxSxHxK.shape[:2]
        # A product: its gradient is one, too, which adds in the same order on every device.
        is_in_NxB = jax.nn.one_hot(self.first_N // tokens, rows, dtype=x_BxSxHxK.dtype)
        return jnp.einsum(
            "nb,bshk->nshk", is_in_NxB, x_BxSxHxK, precision=jax.lax.Precision.HIGHEST
        )


class Attention(nnx.Module):
    """Multi-head self-attention with its residual connection and post-norm."""

    def __init__(self, config: BertConfig, implementation: str, make: _Factory):
        self.config, self.implementation = config, implementation
        width = config.hidden_size
        self.query = make.linear(width, width)
        self.key = make.linear(width, width)
        self.value = make.linear(width, width)
        self.out = make.linear(width, width)
        self.norm = make.norm()

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """Mixes tokens along the attended ones of a bool mask; the shape stays, or is `only`'s."""
        asked_BxTxD, implementation = x_BxTxD, self.implementation
        k_BxSxHxK, v_BxSxHxK = self._split(self.key(x_BxTxD)), self._split(self.value(x_BxTxD))
        if only is not None:
            asked_BxTxD, mask_BxTxS = only.tokens(x_BxTxD), only.tokens(mask_BxTxS)
            k_BxSxHxK, v_BxSxHxK = only.rows(k_BxSxHxK), only.rows(v_BxSxHxK)
            implementation = "einsum"  # fused kernels are not made for one query
        y_BxTxHxK = attend(
            self._split(self.query(asked_BxTxD)),
            k_BxSxHxK,
            v_BxSxHxK,
            mask_BxTxS,
            implementation=implementation,
            dropout_rate=self.config.attention_probs_dropout_prob,
            rngs=rngs,
        )
        y_BxTxD = self.out(y_BxTxHxK.reshape(asked_BxTxD.shape))
        return self.norm(asked_BxTxD + dropout(y_BxTxD, self.config.hidden_dropout_prob, rngs))

    def _split(self, x_BxTxD: jax.Array) -> jax.Array:
        heads = self.config.num_attention_heads
        return x_BxTxD.reshape(*x_BxTxD.shape[:2], heads, -1)


class Mlp(nnx.Module):
    """Feed-forward block with its residual connection and post-norm."""

    def __init__(self, config: BertConfig, make: _Factory):
        self.config = config
        self.up = make.linear(config.hidden_size, config.intermediate_size)
        self.down = make.linear(config.intermediate_size, config.hidden_size)
        self.norm = make.norm()

    def __call__(self, x_BxTxD: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Transforms every token by itself; the shape stays."""
        y_BxTxD = self.down(ACTIVATIONS[self.config.hidden_act](self.up(x_BxTxD)))
        return self.norm(x_BxTxD + dropout(y_BxTxD, self.config.hidden_dropout_prob, rngs))


class Layer(nnx.Module):
    """One transformer block."""

    def __init__(self, config: BertConfig, implementation: str, make: _Factory):
        self.attention = Attention(config, implementation, make)
        self.mlp = Mlp(config, make)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """Attention, then feed-forward; the shape stays, or is `only`'s: (N, 1, D)."""
        return self.mlp(self.attention(x_BxTxD, mask_BxTxS, rngs, only), rngs)


def _attended(mask_BxT: jax.Array) -> jax.Array:
    """(B, T, S): to its own sequence's tokens; padding, as in transformers, to all of the row's."""
    query_BxTx1, key_Bx1xS = mask_BxT[:, :, None], mask_BxT[:, None, :]
    return (key_Bx1xS != 0) & ((query_BxTx1 == key_Bx1xS) | (query_BxTx1 == 0))


class Encoder(nnx.Module):
    """BERT or RoBERTa without a head.

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
        config: BertConfig,
        *,
        attention: str = "einsum",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if attention not in ATTENTIONS:
            raise LoraxError(f"attention={attention!r} is not one of: {', '.join(ATTENTIONS)}")
        if (rate := config.attention_probs_dropout_prob) and attention != "einsum":
            raise LoraxError(
                f"attention={attention!r} cannot drop attention probabilities (rate {rate}): "
                "set model.dropout=0 or model.attention=einsum"
            )
        make = _Factory(config, dtype, param_dtype, rngs)
        self.config, self.remat = config, remat
        self.embeddings = Embeddings(config, make)
        self.layers = nnx.List(
            [Layer(config, attention, make) for _ in range(config.num_hidden_layers)]
        )

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
          token_type_ids_BxT: int token types; None means all 0.
          position_ids_BxT: int positions in each sequence, from 0; None: a sequence a row.
          only: what is read of the last layer, if not all: it computes no more than that.
          rngs: stream `dropout` turns dropout on; None is deterministic.

        Returns:
          Hidden states of shape (B, T, D), or (N, 1, D) for `only`, in the compute dtype.

        Raises:
          LoraxError: without `position_ids_BxT`, T exceeds the model's positions.
        """
        x_BxTxD = self.embeddings(input_ids_BxT, token_type_ids_BxT, position_ids_BxT, rngs)
        mask_BxTxS = _attended(attention_mask_BxT)
        call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        *layers, last = self.layers
        for layer in layers:
            x_BxTxD = call(layer, x_BxTxD, mask_BxTxS, rngs)
        return call(last, x_BxTxD, mask_BxTxS, rngs, only)


class Head(nnx.Module):
    """Pooling, dropout and the output layer, in float32.

    Args:
      config: the encoder's architecture.
      num_outputs: classes, or 1 for a regression.
      pooling: `mean` over a sequence's tokens, `cls` (its first), or `pooler` (its first through
        `dense` and tanh, as Hugging Face's sequence classifiers do).
      rngs: its stream `params` draws kernels from normal(0.02); biases are zero.
    """

    def __init__(self, config: BertConfig, num_outputs: int, *, pooling: str, rngs: nnx.Rngs):
        if pooling not in POOLINGS:
            raise LoraxError(f"pooling={pooling!r} is not one of: {', '.join(POOLINGS)}")
        linear = functools.partial(nnx.Linear, kernel_init=_kernel_init, rngs=rngs)
        self.config, self.pooling = config, pooling
        self.out = linear(config.hidden_size, num_outputs)
        if pooling == "pooler":
            self.dense = linear(config.hidden_size, config.hidden_size)

    def reads(self, first_N: jax.Array | None) -> FirstTokens | None:
        """What it reads of the hidden states; None: all."""
        return None if self.pooling == "mean" else FirstTokens(first_N)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array,
        first_N: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps what it reads of the hidden states to float32 logits of shape (N, C)."""
        rate = self.config.classifier_dropout
        rate = self.config.hidden_dropout_prob if rate is None else rate
        if self.pooling == "mean":
            x_NxD = _mean(x_BxTxD, mask_BxT, first_N)
        else:
            x_NxD = self._first(x_BxTxD, rate, rngs)
        return self.out(dropout(x_NxD, rate, rngs))

    def _first(self, x_Nx1xD: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
        x_NxD = x_Nx1xD[:, 0].astype(jnp.float32)
        if self.pooling == "cls":
            return x_NxD
        if self.config.model_type == "roberta":
            x_NxD = dropout(x_NxD, rate, rngs)
        return jnp.tanh(self.dense(x_NxD))


def _mean(x_BxTxD: jax.Array, mask_BxT: jax.Array, first_N: jax.Array | None) -> jax.Array:
    """The mean over each sequence's tokens; zero for one without a token."""
    x_BxTxD = x_BxTxD.astype(jnp.float32)
    if first_N is None:
        mask_BxTx1 = mask_BxT.astype(jnp.float32)[..., None]
        return (x_BxTxD * mask_BxTx1).sum(1) / jnp.maximum(mask_BxTx1.sum(1), 1)
    numbers_Nx1 = 1 + jnp.arange(len(first_N))[:, None]
    is_in_NxBT = (mask_BxT.reshape(1, -1) == numbers_Nx1).astype(jnp.float32)
    flat_BTxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
    total_NxD = jnp.matmul(is_in_NxBT, flat_BTxD, precision=jax.lax.Precision.HIGHEST)
    return total_NxD / jnp.maximum(is_in_NxBT.sum(1, keepdims=True), 1)


class SequenceClassifier(nnx.Module):
    """An encoder (`encoder`) and a classification or regression head (`head`).

    Args:
      config: the architecture.
      num_outputs: classes, or 1 for a regression.
      pooling: see `Head`.
      attention: see `Encoder`.
      dtype: compute dtype of the encoder; the head computes in float32.
      param_dtype: storage of the encoder's parameters; the head's are float32.
      remat: see `Encoder`.
      rngs: draws the parameters.
    """

    def __init__(
        self,
        config: BertConfig,
        num_outputs: int,
        *,
        pooling: str = "mean",
        attention: str = "einsum",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(
            config,
            attention=attention,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            rngs=rngs,
        )
        self.head = Head(config, num_outputs, pooling=pooling, rngs=rngs)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        position_ids_BxT: jax.Array | None = None,
        first_tokens_N: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps a batch to float32 logits of shape (N, C).

        Args:
          input_ids_BxT: as in `Encoder`.
          attention_mask_BxT: as in `Encoder`; several sequences a row are numbered through the
            batch, 1 to N.
          token_type_ids_BxT: as in `Encoder`.
          position_ids_BxT: as in `Encoder`.
          first_tokens_N: where each sequence begins in the rows laid end to end; None: a sequence
            a row.
          rngs: as in `Encoder`.
        """
        x_BxTxD = self.encoder(
            input_ids_BxT,
            attention_mask_BxT,
            token_type_ids_BxT,
            position_ids_BxT=position_ids_BxT,
            only=self.head.reads(first_tokens_N),
            rngs=rngs,
        )
        return self.head(x_BxTxD, attention_mask_BxT, first_tokens_N, rngs)
