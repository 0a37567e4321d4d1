"""What GPT-2 and the families of LLaMA's kind share: a decoder of pre-norm blocks with a cache.

Shapes in names: B rows, T tokens, S attended columns (= T without a cache), D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.models.layers.attention import check_attention
from lorax.models.layers.causal_attention import KVCache, Past, columns, count_positions, grown
from lorax.models.layers.embeddings import WordTable
from lorax.models.layers.maker import Maker, kernel_init
from lorax.models.layers.pooling import Prefix


class Decoder(nnx.Module):
    """A decoder without a head. A family makes its layers, and says how positions count.

    Layers are called as (x, mask, rotation, past, rngs) -> (x, past).

    Args:
      config: the architecture. Beside sizes it has `attention_dropout`, `windows` (of each layer
        the columns that a token attends to; None: all), `num_key_value_heads` and `head_dim`.
      attention: `einsum` (plain), or `xla` or `cudnn` of `jax.nn.dot_product_attention`, which
        cannot drop attention probabilities; `cudnn` needs a GPU and bfloat16.
      dtype: of matrix products and activations; norms' statistics, softmax and the turning by
        positions are float32.
      param_dtype: of the stored parameters.
      remat: keep the inputs of layers alone, and compute each once more in the backward pass.
      rngs: its stream `params` draws the parameters, normal(0.02) as Hugging Face does.

    Raises:
      LoraxError: unknown `attention`, or one that cannot apply the config's attention dropout.
    """

    layers: Any
    norm: Any

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
        check_attention(attention, config.attention_dropout)
        make = Maker(dtype, param_dtype, rngs)
        self.config, self.remat, self.dtype = config, remat, make.dtype
        self.word = WordTable(
            config.vocab_size,
            config.hidden_size,
            param_dtype=make.param_dtype,
            embedding_init=kernel_init,
            rngs=rngs,
        )
        self.make_layers(attention, make)

    def make_layers(self, attention: str, make: Maker) -> None:
        """All modules but the word embeddings: `layers`, `norm` and what the family needs."""
        raise NotImplementedError

    def count_positions(self, mask_BxT: jax.Array, cache: KVCache | None) -> jax.Array:
        """(B, T): of each token, where they are not given."""
        return count_positions(mask_BxT, cache)

    def embed(
        self, ids_BxT: jax.Array, positions_BxT: jax.Array, rngs: nnx.Rngs | None
    ) -> jax.Array:
        """What the first layer takes: (B, T, D)."""
        del positions_BxT, rngs
        return self.word(ids_BxT).astype(self.dtype)

    def rotation(self, positions_BxT: jax.Array, sequences_BxT: jax.Array) -> Any:
        """What turns queries and keys; None where positions are embedded."""
        del positions_BxT, sequences_BxT

    def __call__(
        self,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        *,
        position_ids_BxT: jax.Array | None = None,
        cache: KVCache | None = None,
        rngs: nnx.Rngs | None = None,
        prefix: Prefix | None = None,
    ) -> Any:
        """Decodes a batch, a sequence a row, or several.

        Args:
          input_ids_BxT: int token ids, padded on either side.
          attention_mask_BxT: 0 or False on padding. Tokens of a row attend to those of the same
            number up to their own column: 1 where a row is one sequence; else sequences are
            numbered.
          position_ids_BxT: int positions in each sequence, from 0; None: the real tokens of each
            row are counted, those in the cache included.
          cache: of the columns before; T more are written to it.
          rngs: stream `dropout` turns dropout on; None is deterministic.
          prefix: outputs of the first layers, which are not computed then; not with a cache.

        Returns:
          Hidden states of shape (B, T, D) in the compute dtype; with a cache, (states, cache).

        Raises:
          LoraxError: the cache has no room; or T exceeds a model's table of positions, without
            `position_ids_BxT`.
        """
        seen = columns(attention_mask_BxT, cache)
        if position_ids_BxT is None:
            position_ids_BxT = self.count_positions(attention_mask_BxT, cache)
        positions_BxT = jnp.asarray(position_ids_BxT)
        if prefix is None:
            x_BxTxD = self.embed(jnp.asarray(input_ids_BxT), positions_BxT, rngs)
            numbers = range(len(self.layers))
        else:
            x_BxTxD, numbers = prefix.outputs, range(prefix.layers, len(self.layers))
        x_BxTxD, pasts = self._run_layers(
            numbers, x_BxTxD, seen, positions_BxT, cache=cache, rngs=rngs
        )
        x_BxTxD = self.norm(x_BxTxD)
        return x_BxTxD if cache is None else (x_BxTxD, grown(pasts, seen))

    def first_layers(
        self,
        count: int,
        input_ids_BxT: jax.Array,
        attention_mask_BxT: jax.Array,
        *,
        position_ids_BxT: jax.Array,
    ) -> Prefix:
        """The outputs of the first `count` layers, one or more, without dropout."""
        seen = columns(attention_mask_BxT, None)
        x_BxTxD = self.embed(input_ids_BxT, position_ids_BxT, None)
        x_BxTxD, _ = self._run_layers(range(count), x_BxTxD, seen, position_ids_BxT)
        return Prefix(count, x_BxTxD)

    def _run_layers(
        self,
        numbers: range,
        x_BxTxD: jax.Array,
        seen: Any,
        positions_BxT: jax.Array,
        *,
        cache: KVCache | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, list[Past]]:
        rotation = self.rotation(positions_BxT, seen.query)
        masks = {window: seen.may_attend(window) for window in set(self.config.windows)}
        call = type(self.layers[0]).__call__
        call = nnx.remat(call) if self.remat else call
        pasts: list[Past] = []
        for n in numbers:
            past = None if cache is None else Past(cache.keys[n], cache.values[n], cache.next)
            mask = masks[self.config.windows[n]]
            x_BxTxD, past = call(self.layers[n], x_BxTxD, mask, rotation, past, rngs)
            pasts += [] if past is None else [past]
        return x_BxTxD, pasts
