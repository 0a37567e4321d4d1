"""What BERT, MPNet and DeBERTa share: an encoder of post-norm blocks, read in whole or in part.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width, H heads, K width of a head,
N sequences.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.models.layers.attention import attend, check_attention, may_attend, split_heads
from lorax.models.layers.embeddings import check_length
from lorax.models.layers.functions import dropout
from lorax.models.layers.maker import Maker
from lorax.models.layers.mlp import PostNormMlp
from lorax.models.layers.pooling import FirstTokens, Prefix


class Embeddings(nnx.Module):
    """Word embeddings, with those of positions and of token types if any, summed and normalised.

    Args:
      config: of a family of encoders. It has `embedding_size` (None: `hidden_size`),
        `type_vocab_size` (0: none) and `first_position`, the row of the table that a sequence's
        first token takes: above 0, positions count real tokens.
      make: the network's maker.
    """

    def __init__(self, config: Any, make: Maker):
        self.config = config
        width = config.embedding_size or config.hidden_size
        self.word = make.embed(config.vocab_size, width)
        self.position = make.embed(config.max_position_embeddings, width)
        if config.type_vocab_size:
            self.token_type = make.embed(config.type_vocab_size, width)
        self.norm = make.norm(width, eps=config.layer_norm_eps)
        if width != config.hidden_size:
            self.project = make.linear(width, config.hidden_size)

    def _rows(self, ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> jax.Array:
        """Of the position table; without positions, those of a sequence a row."""
        first = self.config.first_position
        if positions_BxT is not None:
            return positions_BxT + first
        check_length(ids_BxT, self.config.max_length)
        if not first:
            return jnp.broadcast_to(jnp.arange(ids_BxT.shape[1])[None], ids_BxT.shape)
        real_BxT = (ids_BxT != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(real_BxT, axis=1) * real_BxT + self.config.pad_token_id

    def __call__(
        self,
        ids_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array | None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Looks up token ids, token types (None: all 0) and positions; returns (B, T, D)."""
        rows_BxT = self._rows(ids_BxT, positions_BxT)
        x_BxTxD = self.word(ids_BxT).astype(jnp.float32)
        if self.config.type_vocab_size:
            types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
            x_BxTxD += self.token_type(types_BxT).astype(jnp.float32)
        x_BxTxD += self.position(rows_BxT).astype(jnp.float32)
        x_BxTxD = dropout(self.norm(x_BxTxD), self.config.hidden_dropout_prob, rngs)
        if self.config.embedding_size in (None, self.config.hidden_size):
            return x_BxTxD
        return self.project(x_BxTxD).astype(x_BxTxD.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with its residual connection and post-norm.

    Args:
      config: of a family of encoders.
      implementation: see `Encoder`.
      make: the network's maker.
    """

    def __init__(self, config: Any, implementation: str, make: Maker):
        self.config, self.implementation = config, implementation
        self.scale: float | None = None
        width = config.hidden_size
        self.query = make.linear(width, width)
        self.key = make.linear(width, width)
        self.value = make.linear(width, width)
        self.out = make.linear(width, width)
        self.norm = make.norm(width, eps=config.layer_norm_eps)

    def bias(
        self,
        q_BxTxHxK: jax.Array,
        k_BxSxHxK: jax.Array,
        relation: Any,
        only: FirstTokens | None,
        rngs: nnx.Rngs | None,
    ) -> jax.Array | None:
        """What a family adds to the logits: (B, H, T, S); None: nothing."""
        del q_BxTxHxK, k_BxSxHxK, relation, only, rngs
        return None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        relation: Any,
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
            implementation = "einsum"  # fused kernels are not made for one query
        q_BxTxHxK = split_heads(self.query(asked_BxTxD), heads)
        y_BxTxHxK = attend(
            q_BxTxHxK,
            k_BxSxHxK,
            v_BxSxHxK,
            mask_BxTxS,
            bias_BxHxTxS=self.bias(q_BxTxHxK, k_BxSxHxK, relation, only, rngs),
            scale=self.scale,
            implementation=implementation,
            dropout_rate=self.config.attention_probs_dropout_prob,
            rngs=rngs,
        )
        y_BxTxD = self.out(y_BxTxHxK.reshape(asked_BxTxD.shape))
        return self.norm(asked_BxTxD + dropout(y_BxTxD, self.config.hidden_dropout_prob, rngs))


class Layer(nnx.Module):
    """One transformer block."""

    def __init__(self, attention: Attention, make: Maker):
        config = attention.config
        self.attention = attention
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
        relation: Any,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """Attention, then feed-forward; the shape stays, or is `only`'s: (N, 1, D)."""
        return self.mlp(self.attention(x_BxTxD, mask_BxTxS, relation, rngs, only), rngs)


class Encoder(nnx.Module):
    """An encoder without a head. A family says what is embedded, and what distances add.

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

    attention_class = Attention

    def __init__(
        self,
        config: Any,
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
        self.make_embeddings(make)
        blocks = range(config.num_hidden_layers)
        self.layers = nnx.List(
            [Layer(self.attention_class(config, attention, make), make) for _ in blocks]
        )

    def make_embeddings(self, make: Maker) -> None:
        """All modules but the layers."""
        self.embeddings: Any = Embeddings(self.config, make)

    def positions(self, ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> Any:
        """What `embed` and `relation` take for positions."""
        del ids_BxT
        return positions_BxT

    def embed(
        self,
        ids_BxT: jax.Array,
        mask_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: Any,
        rngs: nnx.Rngs | None,
    ) -> jax.Array:
        """What the first layer takes: (B, T, D)."""
        del mask_BxT
        return self.embeddings(ids_BxT, types_BxT, positions_BxT, rngs)

    def relation(self, ids_BxT: jax.Array, positions_BxT: Any) -> Any:
        """What the `bias` of all layers is made from: a table, the distances between tokens."""
        del ids_BxT, positions_BxT

    def may_attend(self, mask_BxT: jax.Array) -> jax.Array:
        """(B, T, S): where tokens attend to."""
        return may_attend(mask_BxT)

    def run_layers(
        self,
        layers: Any,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array,
        relation: Any,
        *,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """All of some layers in turn; the last one computes no more than `only`."""
        mask_BxTxS = self.may_attend(mask_BxT)
        call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        *layers, last = layers
        for layer in layers:
            x_BxTxD = call(layer, x_BxTxD, mask_BxTxS, relation, rngs)
        return call(last, x_BxTxD, mask_BxTxS, relation, rngs, only)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        position_ids_BxT: jax.Array | None = None,
        only: FirstTokens | None = None,
        rngs: nnx.Rngs | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Encodes a batch, a sequence a row, or several.

        Args:
          input_ids_BxT: int token ids, padded on either side.
          attention_mask_BxT: 0 or False on padding. Tokens of a row attend to those of the same
            number: 1 where a row is one sequence; else sequences are numbered.
          token_type_ids_BxT: int token types; None means all 0. A model without them has no use
            for them.
          position_ids_BxT: int positions in each sequence, from 0; None: a sequence a row.
          only: what is read of the last layer, if not all: it computes no more than that.
          rngs: stream `dropout` turns dropout on; None is deterministic.
          prefix: outputs of the first layers, which are not computed then.

        Returns:
          Hidden states of shape (B, T, D), or (N, 1, D) for `only`, in the compute dtype.

        Raises:
          LoraxError: without `position_ids_BxT`, T exceeds the model's positions.
        """
        positions_BxT = self.positions(input_ids_BxT, position_ids_BxT)
        relation = self.relation(input_ids_BxT, positions_BxT)
        if prefix is None:
            types, mask_BxT = token_type_ids_BxT, attention_mask_BxT
            x_BxTxD, done = self.embed(input_ids_BxT, mask_BxT, types, positions_BxT, rngs), 0
        else:
            x_BxTxD, done = prefix.outputs, prefix.layers
        layers = [*self.layers][done:]
        return self.run_layers(layers, x_BxTxD, attention_mask_BxT, relation, rngs=rngs, only=only)

    def first_layers(
        self,
        count: int,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        position_ids_BxT: jax.Array | None = None,
    ) -> Prefix:
        """The outputs of the first `count` layers, one or more, without dropout."""
        positions_BxT = self.positions(input_ids_BxT, position_ids_BxT)
        mask_BxT, types_BxT = attention_mask_BxT, token_type_ids_BxT
        x_BxTxD = self.embed(input_ids_BxT, mask_BxT, types_BxT, positions_BxT, None)
        relation = self.relation(input_ids_BxT, positions_BxT)
        layers = [*self.layers][:count]
        return Prefix(count, self.run_layers(layers, x_BxTxD, mask_BxT, relation))
