"""DeBERTa-v2 and -v3 encoders (He et al. 2021), in Flax NNX.

Content attends to content, to how far away it is, and is sought by it: the last two are a bias on
the logits, made anew in each layer from one table of relative positions.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width, H heads, K width of a head,
R rows of the table of relative positions.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.errors import LoraxError, brief
from lorax.models.families import encoder
from lorax.models.families.deberta_conv import CONV_ACTIVATIONS, Conv
from lorax.models.families.family import Family, Pooler, Rule, check_sizes, read_config
from lorax.models.layers.attention import split_heads
from lorax.models.layers.embeddings import check_length
from lorax.models.layers.functions import ACTIVATIONS, dropout
from lorax.models.layers.maker import Maker
from lorax.models.layers.pooling import FirstTokens
from lorax.models.options import Count, Epsilon, Layers, Length, Limit, Rate, Size, read_option

# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deberta-v2",),
    "hidden_act": tuple(ACTIVATIONS),
    "norm_rel_ebd": ("none", "layer_norm"),
    "conv_act": ("tanh", *(name for name in CONV_ACTIVATIONS if name != "tanh")),
    "conv_groups": (1,),
    "pooler_dropout": (0,),
    "pooler_hidden_act": ("gelu",),
}
_ATTENDED = ("c2p", "p2c")  # content to position, position to content
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class DebertaConfig:
    """The architecture, in the names of DeBERTa's `config.json`.

    Attributes:
      embedding_size: width of the embeddings, projected to `hidden_size`; None: that.
      position_biased_input: whether positions are embedded, too.
      relative_attention: whether distances count in attention.
      pos_att_type: of `c2p` and `p2c`, those that do.
      share_att_key: whether relative positions go through the layers of queries and keys.
      position_buckets: rows for each direction, by logarithm from half of them on; below 1: a row
        for each distance.
      max_relative_positions: the farthest distance; below 1: `max_position_embeddings`.
      conv_kernel_size: tokens of the convolution beside the first layer; 0: there is none.
      conv_act: its activation.
      norm_rel_ebd: `layer_norm` normalises the table of relative positions; else `none`.
      classifier_dropout: rate before the output layer (`cls_dropout`); None means
        `hidden_dropout_prob`.
    """

    vocab_size: Length
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    model_type: str = "deberta-v2"
    embedding_size: Size | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: Length = 512
    type_vocab_size: Count = 0
    position_biased_input: bool = True
    relative_attention: bool = False
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    position_buckets: Limit = -1
    max_relative_positions: Limit = -1
    conv_kernel_size: Count = 0
    conv_act: str = "tanh"
    norm_rel_ebd: str = "none"
    layer_norm_eps: Epsilon = 1e-7
    pad_token_id: Count = 0
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    classifier_dropout: Rate | None = None

    def __post_init__(self) -> None:
        check_sizes(self)
        if (window := self.conv_kernel_size) and window % 2 == 0:
            raise LoraxError(f"config.json: conv_kernel_size={window} is no odd number")
        middle = self.position_buckets // 2
        if self.position_buckets > 0 and not 0 < middle < self.farthest - 1:
            raise LoraxError(
                f"config.json: position_buckets={self.position_buckets} is not from 2 to below "
                f"twice the farthest distance, {self.farthest - 1}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DebertaConfig":
        """Reads the dict of a Hugging Face `config.json`.

        Raises:
          LoraxError: an option that changes the computation and is not served here, or a size
            that is absent.
        """
        served = {**_SERVED, "pooler_hidden_size": (config.get("hidden_size"),)}
        kinds = read_option(config, "pos_att_type", str | tuple[str, ...], ())
        config = {**config, "pos_att_type": _attended(kinds)}
        names = {"classifier_dropout": ("cls_dropout",)}
        return cls(**read_config(cls, config, served=served, names=names))

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that is served."""
        return self.max_position_embeddings

    @property
    def farthest(self) -> int:
        """The distance that buckets reach to."""
        given = self.max_relative_positions
        return given if given > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Rows of the table of relative positions for each direction."""
        return self.position_buckets if self.position_buckets > 0 else self.farthest

    @property
    def attention_scale(self) -> float:
        """Of the products in attention; their number counts in it."""
        head_width = self.hidden_size // self.num_attention_heads
        return (head_width * (1 + len(self.pos_att_type))) ** -0.5

    def uses(self, kind: str) -> bool:
        """Whether `c2p` or `p2c` is a part of attention."""
        return self.relative_attention and kind in self.pos_att_type


def _attended(kinds: str | tuple[str, ...]) -> tuple[str, ...]:
    """`pos_att_type`, which is a list or like `p2c|c2p`, in one spelling."""
    if isinstance(kinds, str):
        kinds = tuple(kind.strip() for kind in kinds.lower().split("|") if kind.strip())
    if unknown := [kind for kind in kinds if kind not in _ATTENDED]:
        raise LoraxError(
            f"config.json: pos_att_type={brief(unknown[0])} is not one of: {', '.join(_ATTENDED)}"
        )
    return tuple(kind for kind in _ATTENDED if kind in kinds)


class Embeddings(nnx.Module):
    """Word embeddings, those of positions and token types if any, summed and normalised."""

    def __init__(self, config: DebertaConfig, make: Maker):
        self.config = config
        width = config.embedding_size or config.hidden_size
        self.word = make.embed(config.vocab_size, width)
        if config.position_biased_input:
            self.position = make.embed(config.max_position_embeddings, width)
        if config.type_vocab_size > 0:
            self.token_type = make.embed(config.type_vocab_size, width)
        if width != config.hidden_size:
            self.project = make.linear(width, config.hidden_size, use_bias=False)
        self.norm = make.norm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self,
        ids_BxT: jax.Array,
        mask_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Looks up token ids, token types (None: all 0) and positions; returns (B, T, D)."""
        x_BxTxD = self.word(ids_BxT).astype(jnp.float32)
        if self.config.position_biased_input:
            x_BxTxD += self.position(positions_BxT).astype(jnp.float32)
        if self.config.type_vocab_size > 0:
            types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
            x_BxTxD += self.token_type(types_BxT).astype(jnp.float32)
        if self.config.embedding_size not in (None, self.config.hidden_size):
            x_BxTxD = self.project(x_BxTxD)
        x_BxTxD = self.norm(x_BxTxD)
        x_BxTxD = jnp.where(mask_BxT[..., None] != 0, x_BxTxD, jnp.zeros_like(x_BxTxD))
        return dropout(x_BxTxD, self.config.hidden_dropout_prob, rngs)


class Relative(NamedTuple):
    """What layers need to know of relative positions.

    Attributes:
      table: (1, R, D) states of the relative positions, normalised if they are to be.
      rows: (B, T, S), the row of each pair of tokens.
    """

    table: jax.Array
    rows: jax.Array


def _buckets_of_distances(config: DebertaConfig, tokens: int) -> np.ndarray:
    """The bucket of each distance below `tokens`: each its own, or by logarithm if far.

    On the host and in float32, since a logarithm that is off by one bit moves a token to another
    bucket.
    """
    distances = np.arange(tokens)
    if config.position_buckets <= 0:
        return distances.astype(np.int32)
    middle = config.position_buckets // 2
    part = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(middle))
    part = part / np.log(np.float32((config.farthest - 1) / middle)) * np.float32(middle - 1)
    return np.where(distances <= middle, distances, np.ceil(part) + middle).astype(np.int32)


def relative_rows(config: DebertaConfig, positions_BxT: jax.Array) -> jax.Array:
    """The row of the table of relative positions for each pair of tokens: (B, T, S)."""
    tokens = max(config.max_length, positions_BxT.shape[1])
    behind_BxTxS = positions_BxT[:, :, None] - positions_BxT[:, None, :]
    distances_BxTxS = jnp.minimum(jnp.abs(behind_BxTxS), tokens - 1)
    buckets_BxTxS = jnp.asarray(_buckets_of_distances(config, tokens))[distances_BxTxS]
    rows_BxTxS = jnp.where(behind_BxTxS < 0, -buckets_BxTxS, buckets_BxTxS) + config.span
    return jnp.clip(rows_BxTxS, 0, 2 * config.span - 1)


class Attention(encoder.Attention):
    """Disentangled self-attention."""

    def __init__(self, config: DebertaConfig, implementation: str, make: Maker):
        super().__init__(config, implementation, make)
        self.scale = config.attention_scale
        width = config.hidden_size
        if config.uses("c2p") and not config.share_att_key:
            self.pos_key = make.linear(width, width)
        if config.uses("p2c") and not config.share_att_key:
            self.pos_query = make.linear(width, width)

    def bias(
        self,
        q_BxTxHxK: jax.Array,
        k_BxSxHxK: jax.Array,
        relation: Relative | None,
        only: FirstTokens | None,
        rngs: nnx.Rngs | None,
    ) -> jax.Array | None:
        """What relative positions add to the logits: (B, H, T, S); None: nothing."""
        if relation is None:
            return None
        config, rows_BxTxS = self.config, relation.rows
        rows_BxTxS = rows_BxTxS if only is None else only.tokens(rows_BxTxS)
        table_1xRxD = dropout(relation.table, config.hidden_dropout_prob, rngs)
        parts = []
        if config.uses("c2p"):
            positions = self.key if config.share_att_key else self.pos_key
            parts.append(self._scores(q_BxTxHxK, positions(table_1xRxD), rows_BxTxS))
        if config.uses("p2c"):
            positions = self.query if config.share_att_key else self.pos_query
            rows_BxSxT = jnp.swapaxes(rows_BxTxS, 1, 2)
            scores_BxHxSxT = self._scores(k_BxSxHxK, positions(table_1xRxD), rows_BxSxT)
            parts.append(jnp.swapaxes(scores_BxHxSxT, 2, 3))
        return sum(parts[1:], parts[0]) * config.attention_scale

    def _scores(
        self, x_BxTxHxK: jax.Array, positions_1xRxD: jax.Array, rows_BxTxS: jax.Array
    ) -> jax.Array:
        """Products of tokens with the positions in their pairs' rows: (B, H, T, S)."""
        positions_RxHxK = split_heads(positions_1xRxD, self.config.num_attention_heads)[0]
        all_BxHxTxR = _einsum("bthk,rhk->bhtr", x_BxTxHxK, positions_RxHxK)
        return jnp.take_along_axis(all_BxHxTxR, rows_BxTxS[:, None], axis=3, mode="clip")


class Encoder(encoder.Encoder):
    """A DeBERTa-v2 encoder without a head; see `lorax.models.families.encoder.Encoder`."""

    attention_class = Attention

    def make_embeddings(self, make: Maker) -> None:
        """All modules but the layers."""
        config = self.config
        self.embeddings = Embeddings(config, make)
        if config.relative_attention:
            self.relative = make.embed(2 * config.span, config.hidden_size)
        if config.norm_rel_ebd == "layer_norm":  # there in checkpoints, even if of no use
            self.relative_norm = make.norm(config.hidden_size, eps=config.layer_norm_eps)
        if config.conv_kernel_size:
            self.conv = Conv(
                config.hidden_size,
                config.conv_kernel_size,
                activation=config.conv_act,
                rate=config.hidden_dropout_prob,
                eps=config.layer_norm_eps,
                make=make,
            )

    def positions(self, ids_BxT: jax.Array, positions_BxT: jax.Array | None) -> jax.Array:
        """Where they are not given, those of a sequence a row: the columns."""
        if positions_BxT is not None:
            return positions_BxT
        check_length(ids_BxT, self.config.max_length)
        return jnp.broadcast_to(jnp.arange(ids_BxT.shape[1])[None], ids_BxT.shape)

    def embed(
        self,
        ids_BxT: jax.Array,
        mask_BxT: jax.Array,
        types_BxT: jax.Array | None,
        positions_BxT: jax.Array,
        rngs: nnx.Rngs | None,
    ) -> jax.Array:
        """What the first layer takes: (B, T, D)."""
        return self.embeddings(ids_BxT, mask_BxT, types_BxT, positions_BxT, rngs)

    def may_attend(self, mask_BxT: jax.Array) -> jax.Array:
        """(B, T, S): to its own sequence's tokens; padding, as in transformers, to none.

        What padding gets is then the mean over the row. A head reads that of rows padded on the
        left.
        """
        query_BxTx1, key_Bx1xS = mask_BxT[:, :, None], mask_BxT[:, None, :]
        return (key_Bx1xS != 0) & (query_BxTx1 == key_Bx1xS)

    def relation(self, ids_BxT: jax.Array, positions_BxT: jax.Array) -> Relative | None:
        """None: distances do not count."""
        del ids_BxT
        if not any(map(self.config.uses, _ATTENDED)):
            return None
        rows_1xR = jnp.arange(2 * self.config.span)[None]
        table_1xRxD = self.relative(rows_1xR).astype(jnp.float32)  # called, as it may be adapted
        if self.config.norm_rel_ebd == "layer_norm":
            table_1xRxD = self.relative_norm(table_1xRxD)
        return Relative(table_1xRxD, relative_rows(self.config, positions_BxT))

    def run_layers(
        self,
        layers: Any,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array,
        relation: Relative | None,
        *,
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """All of some layers in turn, the convolution beside the first one."""
        run = super().run_layers
        if not self.config.conv_kernel_size or layers[0] is not self.layers[0]:
            return run(layers, x_BxTxD, mask_BxT, relation, rngs=rngs, only=only)
        first, *rest = layers  # the convolution reads all of its tokens
        y_BxTxD = run([first], x_BxTxD, mask_BxT, relation, rngs=rngs)
        x_BxTxD = self.conv(x_BxTxD, y_BxTxD, mask_BxT, rngs)
        if rest:
            return run(rest, x_BxTxD, mask_BxT, relation, rngs=rngs, only=only)
        return x_BxTxD if only is None else only.tokens(x_BxTxD)


_OURS = r"encoder\.layers\.(\d+)"
_THEIRS = r"deberta.encoder.layer.\1"
_RULES = (
    Rule(r"encoder\.embeddings\.(word|position|token_type)", r"deberta.embeddings.\1_embeddings"),
    Rule(r"encoder\.embeddings\.norm", "deberta.embeddings.LayerNorm"),
    Rule(r"encoder\.embeddings\.project", "deberta.embeddings.embed_proj"),
    Rule(r"encoder\.relative", "deberta.encoder.rel_embeddings"),
    Rule(r"encoder\.relative_norm", "deberta.encoder.LayerNorm"),
    Rule(
        rf"{_OURS}\.attention\.(query|key|value|pos_key|pos_query)",
        rf"{_THEIRS}.attention.self.\2_proj",
    ),
    Rule(rf"{_OURS}\.attention\.out", f"{_THEIRS}.attention.output.dense"),
    Rule(rf"{_OURS}\.attention\.norm", f"{_THEIRS}.attention.output.LayerNorm"),
    Rule(rf"{_OURS}\.mlp\.up", f"{_THEIRS}.intermediate.dense"),
    Rule(rf"{_OURS}\.mlp\.down", f"{_THEIRS}.output.dense"),
    Rule(rf"{_OURS}\.mlp\.norm", f"{_THEIRS}.output.LayerNorm"),
    Rule(r"encoder\.conv", "deberta.encoder.conv.conv"),
    Rule(r"encoder\.conv\.norm", "deberta.encoder.conv.LayerNorm"),
    Rule(r"head\.dense", "pooler.dense"),
    Rule(r"head\.out", "classifier"),
)

FAMILIES = {
    "deberta-v2": Family(
        config=DebertaConfig,
        network=Encoder,
        rules=_RULES,
        prefix="deberta",
        pooler=Pooler(ACTIVATIONS["gelu"]),
        head=("classifier", "pooler"),
        unneeded=(
            r"(cls|lm_head|lm_predictions|mask_predictions|pooler|classifier|qa_outputs)\..+"
            r"|(.+\.)?position_ids|embeddings\.position_embeddings\..+"
        ),
    ),
}
