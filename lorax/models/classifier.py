"""A sequence-level head on the encoder of any family.

Shapes in names: B rows, T tokens, D width, N sequences (B of them, or more when several share a
row), C outputs of the head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.lora import LoraRows
from lorax.models.families import family_of
from lorax.models.families.family import Pooler
from lorax.models.layers.functions import dropout
from lorax.models.layers.maker import kernel_init
from lorax.models.layers.pooling import FirstTokens, Prefix, sum_by_sequence

POOLINGS = ("mean", "cls", "pooler")


class Head(nnx.Module):
    """Pooling, dropout and the output layer, in float32.

    Args:
      config: the encoder's architecture.
      num_outputs: classes, or 1 for a regression.
      pooling: `mean` over a sequence's tokens, `cls` (its first), or `pooler` (its first through
        `dense` and an activation, as the family's sequence classifier of Hugging Face does).
      rngs: its stream `params` draws kernels from normal(0.02); biases are zero.

    Raises:
      LoraxError: unknown `pooling`.
    """

    def __init__(self, config: Any, num_outputs: int, *, pooling: str, rngs: nnx.Rngs):
        if pooling not in POOLINGS:
            raise LoraxError(f"pooling={pooling!r} is not one of: {', '.join(POOLINGS)}")
        linear = functools.partial(nnx.Linear, kernel_init=kernel_init, rngs=rngs)
        self.config, self.pooling = config, pooling
        self.out = linear(config.hidden_size, num_outputs)
        if pooling == "pooler":
            self.dense = linear(config.hidden_size, config.hidden_size)

    def reads(self, places: jax.Array | None) -> FirstTokens | None:
        """What it reads of the hidden states; None: all."""
        return None if self.pooling == "mean" else FirstTokens(places)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array,
        places: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps what it reads of the hidden states to float32 logits of shape (N, C)."""
        return self.classify(self.pool(x_BxTxD, mask_BxT, places), rngs)

    def pool(
        self, x_BxTxD: jax.Array, mask_BxT: jax.Array, places: jax.Array | None = None
    ) -> jax.Array:
        """What it reads of each sequence, before anything trained or dropped: (N, D) float32."""
        if self.pooling == "mean":
            return _mean(x_BxTxD, mask_BxT, places)
        return x_BxTxD[:, 0].astype(jnp.float32)

    def classify(self, x_NxD: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps what `pool` gives to float32 logits of shape (N, C)."""
        rate = self.config.classifier_dropout
        rate = self.config.hidden_dropout_prob if rate is None else rate
        if self.pooling != "pooler":
            return self.out(dropout(x_NxD, rate, rngs))
        pooler = family_of(self.config.model_type).pooler or Pooler()
        if pooler.drops_before:
            x_NxD = dropout(x_NxD, rate, rngs)
        x_NxD = pooler.activation(self.dense(x_NxD))
        return self.out(dropout(x_NxD, rate, rngs) if pooler.drops_after else x_NxD)


def _mean(x_BxTxD: jax.Array, mask_BxT: jax.Array, places: jax.Array | None) -> jax.Array:
    """The mean over each sequence's tokens; zero for one without a token."""
    x_BxTxD = x_BxTxD.astype(jnp.float32)
    if places is None:
        mask_BxTx1 = mask_BxT.astype(jnp.float32)[..., None]
        return (x_BxTxD * mask_BxTx1).sum(1) / jnp.maximum(mask_BxTx1.sum(1), 1)
    total_NxD, tokens_Nx1 = sum_by_sequence(x_BxTxD, mask_BxT, len(places))
    return total_NxD / jnp.maximum(tokens_Nx1, 1)


class SequenceClassifier(nnx.Module):
    """An encoder (`encoder`) and a classification or regression head (`head`).

    Args:
      config: the architecture, of a family of encoders.
      num_outputs: classes, or 1 for a regression.
      pooling: see `Head`.
      attention: see the family's encoder.
      dtype: compute dtype of the encoder; the head computes in float32.
      param_dtype: storage of the encoder's parameters; the head's are float32.
      remat: see the family's encoder.
      rngs: draws the parameters.
    """

    def __init__(
        self,
        config: Any,
        num_outputs: int,
        *,
        pooling: str = "mean",
        attention: str = "einsum",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.encoder = family_of(config.model_type).network(
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
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Maps a batch to float32 logits of shape (N, C).

        Args:
          input_ids_BxT: int token ids, padded on either side.
          attention_mask_BxT: 0 on padding, 1 elsewhere; several sequences a row are numbered
            through the batch, 1 to N.
          token_type_ids_BxT: int token types; None means all 0.
          position_ids_BxT: int positions in each sequence, from 0; None: a sequence a row.
          first_tokens_N: where each sequence begins in the rows laid end to end; None: a sequence
            a row.
          rngs: stream `dropout` turns dropout on; None is deterministic.
          prefix: outputs of the encoder's first layers, which are not computed then.
        """
        if first_tokens_N is not None and nnx.state(self, LoraRows):
            raise LoraxError("adapt_rows: give each sequence a row of its own, not packed rows")
        x_BxTxD = self.encoder(
            input_ids_BxT,
            attention_mask_BxT,
            token_type_ids_BxT,
            position_ids_BxT=position_ids_BxT,
            only=self.head.reads(first_tokens_N),
            rngs=rngs,
            prefix=prefix,
        )
        return self.head(x_BxTxD, attention_mask_BxT, first_tokens_N, rngs)

    def features(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        token_type_ids_BxT: jax.Array | None = None,
        *,
        position_ids_BxT: jax.Array | None = None,
        first_tokens_N: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads of each sequence, without dropout, (N, D) float32; see `Head.pool`.

        The arguments are those of a call.
        """
        x_BxTxD = self.encoder(
            input_ids_BxT,
            attention_mask_BxT,
            token_type_ids_BxT,
            position_ids_BxT=position_ids_BxT,
            only=self.head.reads(first_tokens_N),
        )
        return self.head.pool(x_BxTxD, attention_mask_BxT, first_tokens_N)
