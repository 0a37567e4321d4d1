"""LLaMA 2 and 3 (with SmolLM2), Mistral, Qwen2 and Qwen3 decoders, in Flax NNX.

Shapes in names: B rows, T tokens, S attended columns (= T without a cache), D width, H heads,
K width of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError, brief
from lorax.models.families import decoder
from lorax.models.families.family import Family, Rule, check_sizes, read_config
from lorax.models.layers.attention import split_heads
from lorax.models.layers.causal_attention import Past, attend_to_past
from lorax.models.layers.functions import ACTIVATIONS
from lorax.models.layers.maker import Maker
from lorax.models.layers.rope import Rope, Rotation, rotate
from lorax.models.options import Count, Epsilon, Layers, Length, Rate, Size, read_option

# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "hidden_act": tuple(ACTIVATIONS),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
}
_NAMES: dict[str, tuple[str, ...]] = {"rope": (), "windows": ()}  # read apart
# What transformers takes where config.json does not say.
_KEY_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_POSITIONS = {"mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_WINDOWS = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}
_QWEN_FULL_LAYERS = 28
_QWEN3_HEAD = 128
_PLAIN = Rope()


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, in the names of LLaMA's `config.json`.

    Attributes:
      model_type: as in `config.json`; `qwen2` has biases in query, key and value, `qwen3` norms
        of queries and keys.
      num_key_value_heads: heads of keys and values, each for as many heads of the queries.
      head_dim: K; 0 means hidden_size / num_attention_heads.
      attention_bias: whether all four projections have biases.
      mlp_bias: whether the feed-forward layers have biases.
      rope: rotary positions.
      windows: of each layer the number of columns that a token attends to, its own included;
        None: all. Empty: all layers attend to all.
    """

    vocab_size: Length
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    model_type: str = "llama"
    max_position_embeddings: Length = 2048
    num_key_value_heads: Size = 0
    head_dim: Size = 0
    hidden_act: str = "silu"
    rms_norm_eps: Epsilon = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Rate = 0.0
    tie_word_embeddings: bool = False
    rope: Rope = _PLAIN
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        width, heads = self.hidden_size, self.num_attention_heads
        if not self.head_dim:
            check_sizes(self)
            object.__setattr__(self, "head_dim", width // heads)
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", heads)
        if heads % (groups := self.num_key_value_heads):
            raise LoraxError(
                f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
            )
        self.rope.check_width(self.head_dim)
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_hidden_layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dict of a Hugging Face `config.json`.

        Raises:
          LoraxError: an option that changes the computation and is not served here, or a size
            that is absent.
        """
        served = {"model_type": tuple(FAMILIES), **_SERVED}
        if config.get("max_position_embeddings") is None:
            positions = _POSITIONS.get(str(config.get("model_type")), 2048)
            config = {**config, "max_position_embeddings": positions}
        found = read_config(cls, config, served=served, names=_NAMES)
        kind = found.get("model_type", "llama")
        if kind not in ("llama", "qwen3"):
            found["attention_bias"] = False
        if kind != "llama":
            found["mlp_bias"] = False
        if "num_key_value_heads" not in config and kind in _KEY_HEADS:
            found["num_key_value_heads"] = _KEY_HEADS[kind]
        if "head_dim" not in config and kind == "qwen3":
            found["head_dim"] = _QWEN3_HEAD
        windows = _windows(kind, config, found["num_hidden_layers"])
        return cls(**found, rope=Rope.from_hf(config), windows=windows)

    @property
    def max_length(self) -> int:
        """Most tokens a sequence that the base was made for, or is stretched to."""
        return self.rope.reach(self.max_position_embeddings)


def _windows(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Of each layer, as transformers reads it: `layer_types` go before `max_window_layers`."""
    types = read_option(config, "layer_types", tuple[str, ...])
    if types is not None and len(types) != layers:
        raise LoraxError(
            f"config.json: layer_types has {len(types)} entries for num_hidden_layers={layers}"
        )
    if kind == "llama":
        return (None,) * layers
    window = read_option(config, "sliding_window", Length)
    if "sliding_window" not in config:  # a null window is none
        window = _WINDOWS[kind]
    if kind == "mistral":
        return (window,) * layers
    window = window if read_option(config, "use_sliding_window", bool, False) else None
    if types is not None:
        return tuple(_window(name, window) for name in types)
    first = read_option(config, "max_window_layers", Count, _QWEN_FULL_LAYERS)
    return tuple(window if n >= first else None for n in range(layers))


def _window(layer_type: str, window: int | None) -> int | None:
    if layer_type in ("full_attention", "attention"):  # the latter is the older name
        return None
    if layer_type != "sliding_attention" or window is None:
        raise LoraxError(
            f"config.json: layer_types has {brief(layer_type)} with a window of {window}; served "
            "are full_attention, and sliding_attention with a sliding_window"
        )
    return window


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019).

    Statistics are float32, the output is of `dtype`.
    """

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalises; the shape stays."""
        x = inputs.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * scale).astype(self.dtype)


def _rms_norm(make: Maker, features: int, eps: float) -> RMSNorm:
    return RMSNorm(features, eps=eps, dtype=make.dtype, param_dtype=make.param_dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, implementation: str, make: Maker):
        self.config, self.implementation = config, implementation
        width, head = config.hidden_size, config.head_dim
        inner, shared = config.num_attention_heads * head, config.num_key_value_heads * head
        has_bias = config.attention_bias or config.model_type == "qwen2"
        self.query = make.linear(width, inner, use_bias=has_bias)
        self.key = make.linear(width, shared, use_bias=has_bias)
        self.value = make.linear(width, shared, use_bias=has_bias)
        self.out = make.linear(inner, width, use_bias=config.attention_bias)
        if config.model_type == "qwen3":
            self.query_norm = _rms_norm(make, head, config.rms_norm_eps)
            self.key_norm = _rms_norm(make, head, config.rms_norm_eps)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        rotation: Rotation,
        past: Past | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Past | None]:
        """Mixes tokens along the attended ones of a bool mask; the shape stays."""
        config = self.config
        q_BxTxHxK = split_heads(self.query(x_BxTxD), config.num_attention_heads)
        k_BxTxHxK = split_heads(self.key(x_BxTxD), config.num_key_value_heads)
        v_BxTxHxK = split_heads(self.value(x_BxTxD), config.num_key_value_heads)
        if config.model_type == "qwen3":
            dtype = v_BxTxHxK.dtype  # the products', which all three have
            q_BxTxHxK = self.query_norm(q_BxTxHxK).astype(dtype)
            k_BxTxHxK = self.key_norm(k_BxTxHxK).astype(dtype)
        q_BxTxHxK, k_BxTxHxK = rotate(q_BxTxHxK, rotation), rotate(k_BxTxHxK, rotation)
        y_BxTxHxK, past = attend_to_past(
            q_BxTxHxK,
            k_BxTxHxK,
            v_BxTxHxK,
            mask_BxTxS,
            past,
            implementation=self.implementation,
            dropout_rate=config.attention_dropout,
            rngs=rngs,
        )
        return self.out(y_BxTxHxK.reshape(*x_BxTxD.shape[:2], -1)), past


class GatedMlp(nnx.Module):
    """Feed-forward block with a gate (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, make: Maker):
        self.activation, bias = config.hidden_act, config.mlp_bias
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = make.linear(width, inner, use_bias=bias)
        self.up = make.linear(width, inner, use_bias=bias)
        self.down = make.linear(inner, width, use_bias=bias)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Transforms every token by itself; the shape stays."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x_BxTxD)) * self.up(x_BxTxD))


class Layer(nnx.Module):
    """One transformer block; norms come first."""

    def __init__(self, config: LlamaConfig, implementation: str, make: Maker):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = _rms_norm(make, width, eps)
        self.attention = Attention(config, implementation, make)
        self.mlp_norm = _rms_norm(make, width, eps)
        self.mlp = GatedMlp(config, make)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxTxS: jax.Array,
        rotation: Rotation,
        past: Past | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, Past | None]:
        """Attention, then feed-forward; the shape stays."""
        y_BxTxD, past = self.attention(
            self.attention_norm(x_BxTxD), mask_BxTxS, rotation, past, rngs
        )
        x_BxTxD += y_BxTxD.astype(x_BxTxD.dtype)
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD)).astype(x_BxTxD.dtype), past


class Decoder(decoder.Decoder):
    """A decoder of LLaMA's kind without a head; see `lorax.models.families.decoder.Decoder`."""

    def make_layers(self, attention: str, make: Maker) -> None:
        """All modules but the word embeddings."""
        config = self.config
        self.layers = nnx.List(
            [Layer(config, attention, make) for _ in range(config.num_hidden_layers)]
        )
        self.norm = _rms_norm(make, config.hidden_size, config.rms_norm_eps)

    def rotation(self, positions_BxT: jax.Array, sequences_BxT: jax.Array) -> Rotation:
        """What turns queries and keys."""
        return self.config.rope.rotation(positions_BxT, self.config.head_dim, sequences_BxT)


_LAYER = r"decoder\.layers\.(\d+)"
_RULES = (
    Rule(r"decoder\.word", "model.embed_tokens"),
    Rule(rf"{_LAYER}\.attention_norm", r"model.layers.\1.input_layernorm"),
    Rule(rf"{_LAYER}\.mlp\.(gate|up|down)", r"model.layers.\1.mlp.\2_proj"),
    Rule(rf"{_LAYER}\.mlp_norm", r"model.layers.\1.post_attention_layernorm"),
    Rule(r"decoder\.norm", "model.norm"),
    Rule(r"lm_head", "lm_head"),
)
_ATTENTION = tuple(
    Rule(rf"{_LAYER}\.attention\.{ours}", rf"model.layers.\1.self_attn.{theirs}")
    for ours, theirs in (
        ("query", "q_proj"),
        ("key", "k_proj"),
        ("value", "v_proj"),
        ("out", "o_proj"),
        ("query_norm", "q_norm"),
        ("key_norm", "k_norm"),
    )
)
_FAMILY = Family(
    config=LlamaConfig,
    network=Decoder,
    rules=_ATTENTION + _RULES,
    prefix="model",
    head=("score",),
    # The head of a checkpoint whose output layer is its embeddings, and what older ones stored.
    unneeded=r"lm_head\.weight|score\.weight|(.+\.)?rotary_emb\.inv_freq",
)
FAMILIES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _FAMILY)
