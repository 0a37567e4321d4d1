"""GPT-2 decoders, in Flax NNX.

Shapes in names: B rows, T tokens, S attended columns (= T without a cache), D width, H heads,
K width of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.models.families import decoder
from lorax.models.families.family import Family, Rule, check_sizes, read_config
from lorax.models.layers.attention import split_heads
from lorax.models.layers.causal_attention import KVCache, Past, attend_to_past
from lorax.models.layers.embeddings import check_length
from lorax.models.layers.functions import ACTIVATIONS, dropout
from lorax.models.layers.maker import Maker
from lorax.models.options import Epsilon, Layers, Length, Rate, Size

# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", *(name for name in ACTIVATIONS if name != "gelu_new")),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
}
# GPT-2's names; of four sizes BERT's are taken, too, and go before, as in transformers.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "intermediate_size": ("n_inner",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "hidden_act": ("activation_function",),
}


@dataclass(frozen=True)
class Gpt2Config:
    """The architecture, in BERT's names for sizes and GPT-2's own for the rest.

    Attributes:
      model_type: as in `config.json`.
      intermediate_size: inner width of the feed-forward blocks; 0 means 4 hidden_size.
      embd_pdrop: dropout of the embeddings.
      attn_pdrop: dropout of the attention weights.
      resid_pdrop: dropout of each block's output.
      scale_attn_weights: products of queries and keys are divided by sqrt(K).
      scale_attn_by_inverse_layer_idx: and by the layer's number, from 1.
    """

    vocab_size: Length
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    model_type: str = "gpt2"
    intermediate_size: Size = 0
    max_position_embeddings: Length = 1024
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5
    embd_pdrop: Rate = 0.1
    attn_pdrop: Rate = 0.1
    resid_pdrop: Rate = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_sizes(self)
        if not self.intermediate_size:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gpt2Config":
        """Reads the dict of a Hugging Face `config.json`.

        Raises:
          LoraxError: an option that changes the computation and is not served here, or a size
            that is absent.
        """
        served = {"model_type": tuple(FAMILIES), **_SERVED}
        return cls(**read_config(cls, config, served=served, names=_NAMES))

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """As many as the queries'."""
        return self.num_attention_heads

    @property
    def attention_dropout(self) -> float:
        """Rate, in LLaMA's name."""
        return self.attn_pdrop

    @property
    def windows(self) -> tuple[None, ...]:
        """All layers attend to all columns."""
        return (None,) * self.num_hidden_layers

    @property
    def max_length(self) -> int:
        """Most tokens a sequence."""
        return self.max_position_embeddings


class Attention(nnx.Module):
    """Multi-head self-attention of the layer `n`, from 0."""

    def __init__(self, config: Gpt2Config, n: int, implementation: str, make: Maker):
        self.config, self.implementation = config, implementation
        width = config.hidden_size
        self.query = make.linear(width, width)
        self.key = make.linear(width, width)
        self.value = make.linear(width, width)
        self.out = make.linear(width, width)
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= n + 1

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        past: Past | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Past | None]:
        """Mixes tokens along the attended ones of a bool mask; the shape stays."""
        heads = self.config.num_attention_heads
        q_BxTxHxK = split_heads(self.query(x_BxTxD), heads)
        k_BxTxHxK = split_heads(self.key(x_BxTxD), heads)
        v_BxTxHxK = split_heads(self.value(x_BxTxD), heads)
        y_BxTxHxK, past = attend_to_past(
            q_BxTxHxK,
            k_BxTxHxK,
            v_BxTxHxK,
            mask_BxTxS,
            past,
            scale=self.scale,
            implementation=self.implementation,
            dropout_rate=self.config.attn_pdrop,
            rngs=rngs,
        )
        return self.out(y_BxTxHxK.reshape(x_BxTxD.shape)), past


class Mlp(nnx.Module):
    """Feed-forward block."""

    def __init__(self, config: Gpt2Config, make: Maker):
        self.activation = config.hidden_act
        self.up = make.linear(config.hidden_size, config.intermediate_size)
        self.down = make.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Transforms every token by itself; the shape stays."""
        return self.down(ACTIVATIONS[self.activation](self.up(x_BxTxD)))


class Layer(nnx.Module):
    """The transformer block `n`, from 0; norms come first."""

    def __init__(self, config: Gpt2Config, n: int, implementation: str, make: Maker):
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.rate = config.resid_pdrop
        self.attention_norm = make.norm(width, eps=eps)
        self.attention = Attention(config, n, implementation, make)
        self.mlp_norm = make.norm(width, eps=eps)
        self.mlp = Mlp(config, make)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        rotation: None = None,
        past: Past | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Past | None]:
        """Attention, then feed-forward; the shape stays."""
        del rotation  # positions are embedded
        y_BxTxD, past = self.attention(self.attention_norm(x_BxTxD), mask_BxTxS, past, rngs)
        x_BxTxD += dropout(y_BxTxD, self.rate, rngs).astype(x_BxTxD.dtype)
        y_BxTxD = dropout(self.mlp(self.mlp_norm(x_BxTxD)), self.rate, rngs)
        return x_BxTxD + y_BxTxD.astype(x_BxTxD.dtype), past


class Decoder(decoder.Decoder):
    """A decoder of GPT-2's kind without a head; see `lorax.models.families.decoder.Decoder`."""

    def make_layers(self, attention: str, make: Maker) -> None:
        """All modules but the word embeddings."""
        config = self.config
        self.position = make.embed(config.max_position_embeddings, config.hidden_size)
        self.layers = nnx.List(
            [Layer(config, n, attention, make) for n in range(config.num_hidden_layers)]
        )
        self.norm = make.norm(config.hidden_size, eps=config.layer_norm_epsilon)

    def count_positions(self, mask_BxT: jax.Array, cache: KVCache | None) -> jax.Array:
        """(B, T): of each token, where they are not given."""
        check_length(mask_BxT, self.config.max_position_embeddings)
        return super().count_positions(mask_BxT, cache)

    def embed(
        self, ids_BxT: jax.Array, positions_BxT: jax.Array, rngs: nnx.Rngs | None
    ) -> jax.Array:
        """What the first layer takes: (B, T, D)."""
        x_BxTxD = self.word(ids_BxT).astype(jnp.float32)
        x_BxTxD += self.position(positions_BxT).astype(jnp.float32)
        return dropout(x_BxTxD, self.config.embd_pdrop, rngs).astype(self.dtype)


_LAYER = r"decoder\.layers\.(\d+)"
_FUSED = tuple(
    Rule(rf"{_LAYER}\.attention\.{name}", r"transformer.h.\1.attn.c_attn", (n, 3), transposed=False)
    for n, name in enumerate(("query", "key", "value"))
)
_RULES = (
    Rule(r"decoder\.word", "transformer.wte"),
    Rule(r"decoder\.position", "transformer.wpe"),
    Rule(rf"{_LAYER}\.attention\.out", r"transformer.h.\1.attn.c_proj", transposed=False),
    Rule(rf"{_LAYER}\.attention_norm", r"transformer.h.\1.ln_1"),
    Rule(rf"{_LAYER}\.mlp\.up", r"transformer.h.\1.mlp.c_fc", transposed=False),
    Rule(rf"{_LAYER}\.mlp\.down", r"transformer.h.\1.mlp.c_proj", transposed=False),
    Rule(rf"{_LAYER}\.mlp_norm", r"transformer.h.\1.ln_2"),
    Rule(r"decoder\.norm", "transformer.ln_f"),
    Rule(r"lm_head", "lm_head"),
)
FAMILIES = {
    "gpt2": Family(
        config=Gpt2Config,
        network=Decoder,
        rules=_FUSED + _RULES,
        prefix="transformer",
        head=("score",),
        # The head of a checkpoint whose output layer is its embeddings; causal masks.
        unneeded=r"lm_head\.weight|score\.weight|h\.\d+\.attn\.(masked_)?bias",
    )
}
