"""A decoder of any family with the output layer that predicts the next token.

Shapes in names: B rows, T tokens, V words.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.models.families import family_of
from lorax.models.layers.causal_attention import KVCache
from lorax.models.layers.dense import Dense
from lorax.models.layers.maker import Maker
from lorax.models.layers.pooling import Prefix
from lorax.models.layers.token_loss import TokenScores, token_scores

__all__ = ["CausalLM", "KVCache"]


class CausalLM(nnx.Module):
    """A decoder (`decoder`) and its output layer (`lm_head`, unless that is the embeddings).

    Args:
      config: the architecture, of a family of decoders.
      attention: see the family's decoder.
      dtype: compute dtype, the output layer's included.
      param_dtype: of the stored parameters.
      remat: see the family's decoder.
      rngs: draws the parameters.
    """

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
        self.config = config
        self.decoder = family_of(config.model_type).network(
            config,
            attention=attention,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            rngs=rngs,
        )
        if not config.tie_word_embeddings:
            make = Maker(dtype, param_dtype, rngs)
            self.lm_head: Dense = make.linear(config.hidden_size, config.vocab_size, use_bias=False)

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        *,
        position_ids_BxT: jax.Array | None = None,
        cache: KVCache | None = None,
        only_last: bool = False,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Maps a batch to float32 logits of the next tokens, (B, T, V).

        Args:
          input_ids_BxT: int token ids, padded on either side.
          attention_mask_BxT: 0 on padding, 1 elsewhere; several sequences a row are numbered.
          position_ids_BxT: int positions in each sequence, from 0; None: the real tokens of each
            row are counted, those in the cache included.
          cache: of the columns before (`KVCache.empty` at first); T more are written to it.
          only_last: logits of the last column alone, (B, 1, V).
          rngs: stream `dropout` turns dropout on; None is deterministic.

        Returns:
          Logits; with a cache, (logits, cache).

        Raises:
          LoraxError: the cache has no room, or the model no positions for T tokens.
        """
        found = self.decoder(
            input_ids_BxT,
            attention_mask_BxT,
            position_ids_BxT=position_ids_BxT,
            cache=cache,
            rngs=rngs,
        )
        x_BxTxD, cache = (found, None) if cache is None else found
        logits_BxTxV = self._logits(x_BxTxD[:, -1:] if only_last else x_BxTxD)
        return logits_BxTxV if cache is None else (logits_BxTxV, cache)

    def score(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        labels_BxT: jax.Array,
        *,
        position_ids_BxT: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
        smoothing: float = 0.0,
        prefix: Prefix | None = None,
    ) -> TokenScores:
        """How well each token's successor is predicted; the logits of all are never held at once.

        Args:
          input_ids_BxT: as in a call.
          attention_mask_BxT: as in a call.
          labels_BxT: the token to come after each.
          position_ids_BxT: as in a call.
          rngs: as in a call.
          smoothing: share of each target that is spread evenly over all words.
          prefix: outputs of the decoder's first layers, which are not computed then.
        """
        x_BxTxD = self.decoder(
            input_ids_BxT,
            attention_mask_BxT,
            position_ids_BxT=position_ids_BxT,
            rngs=rngs,
            prefix=prefix,
        )
        return token_scores(
            self._logits, x_BxTxD, labels_BxT, self.config.vocab_size, smoothing=smoothing
        )

    def _logits(self, x_BxTxD: jax.Array) -> jax.Array:
        tied = self.config.tie_word_embeddings
        logits_BxTxV = self.decoder.word.attend(x_BxTxD) if tied else self.lm_head(x_BxTxD)
        return logits_BxTxV.astype(jnp.float32)
