"""BERT, RoBERTa (with XLM-R and CamemBERT), ELECTRA and DistilBERT encoders, in Flax NNX.

Shapes in names: B rows, T tokens, S attended tokens (= T), D width, H heads, K width of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lorax.errors import LoraxError
from lorax.models.attention import attend, check_attention
from lorax.models.family import Family, Pooler, Rule, read_config
from lorax.models.functions import ACTIVATIONS, dropout
from lorax.models.layers import Maker, PostNormMlp, may_attend, split_heads
from lorax.models.reading import FirstTokens

# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}
_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class BertConfig:
    """The architecture, in the names of BERT's `config.json`.

    Attributes:
      model_type: as in `config.json`; of `roberta` and its like positions count from the padding
        id.
      embedding_size: width of the embeddings (ELECTRA), projected to `hidden_size`; None: that.
      type_vocab_size: token types; 0 for a model without them.
      classifier_dropout: rate before the output layer; None means `hidden_dropout_prob`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = "bert"
    embedding_size: int | None = None
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
        model_type = config.get("model_type", "bert")
        served = {"model_type": tuple(FAMILIES), **_SERVED}
        if model_type == "distilbert":
            served["activation"] = tuple(ACTIVATIONS)
            fixed = {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
            return cls(**(read_config(cls, config, served=served, names=_DISTILBERT) | fixed))
        served["hidden_act"] = tuple(ACTIVATIONS)
        if model_type == "electra":  # an option of generation alone, which has no other effect
            served["summary_activation"] = ("gelu", config.get("summary_activation"))
        found = read_config(cls, config, served=served)
        pad = FAMILIES[model_type].pad_token
        return cls(**({"pad_token_id": pad} | found))

    @property
    def first_position(self) -> int:
        """The row of the position table that a sequence's first token takes."""
        return self.pad_token_id + 1 if self.model_type in _COUNTS_FROM_PADDING else 0

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that has position embeddings."""
        return self.max_position_embeddings - self.first_position


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: BertConfig, make: Maker):
        self.config = config
        width = config.embedding_size or config.hidden_size
        self.word = make.embed(config.vocab_size, width)
        self.position = make.embed(config.max_position_embeddings, width)
        if config.type_vocab_size:
            self.token_type = make.embed(config.type_vocab_size, width)
        self.norm = make.norm(width, eps=config.layer_norm_eps)
        if width != config.hidden_size:
            self.project = make.linear(width, config.hidden_size)

    def _positions(self, ids_BxT: jax.Array) -> jax.Array:
        """Of a sequence a row, as rows of the table."""
        if ids_BxT.shape[1] > (longest := self.config.max_length):
            raise LoraxError(
                f"sequence of {ids_BxT.shape[1]} tokens: this model has {longest} positions; "
                f"set task.max_length to {longest} or less"
            )
        if self.config.first_position:
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
        x_BxTxD = self.word(ids_BxT).astype(jnp.float32)
        if self.config.type_vocab_size:
            types_BxT = jnp.zeros_like(ids_BxT) if types_BxT is None else types_BxT
            x_BxTxD += self.token_type(types_BxT).astype(jnp.float32)
        x_BxTxD += self.position(places_BxT).astype(jnp.float32)
        x_BxTxD = dropout(self.norm(x_BxTxD), self.config.hidden_dropout_prob, rngs)
        if self.config.embedding_size in (None, self.config.hidden_size):
            return x_BxTxD
        return self.project(x_BxTxD).astype(x_BxTxD.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with its residual connection and post-norm."""

    def __init__(self, config: BertConfig, implementation: str, make: Maker):
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
        y_BxTxHxK = attend(
            split_heads(self.query(asked_BxTxD), heads),
            k_BxSxHxK,
            v_BxSxHxK,
            mask_BxTxS,
            implementation=implementation,
            dropout_rate=self.config.attention_probs_dropout_prob,
            rngs=rngs,
        )
        y_BxTxD = self.out(y_BxTxHxK.reshape(asked_BxTxD.shape))
        return self.norm(asked_BxTxD + dropout(y_BxTxD, self.config.hidden_dropout_prob, rngs))


class Layer(nnx.Module):
    """One transformer block."""

    def __init__(self, config: BertConfig, implementation: str, make: Maker):
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
        rngs: nnx.Rngs | None = None,
        only: FirstTokens | None = None,
    ) -> jax.Array:
        """Attention, then feed-forward; the shape stays, or is `only`'s: (N, 1, D)."""
        return self.mlp(self.attention(x_BxTxD, mask_BxTxS, rngs, only), rngs)


class Encoder(nnx.Module):
    """An encoder of BERT's kind without a head.

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
        check_attention(attention, config.attention_probs_dropout_prob)
        make = Maker(dtype, param_dtype, rngs)
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
          token_type_ids_BxT: int token types; None means all 0. A model without them has no use
            for them.
          position_ids_BxT: int positions in each sequence, from 0; None: a sequence a row.
          only: what is read of the last layer, if not all: it computes no more than that.
          rngs: stream `dropout` turns dropout on; None is deterministic.

        Returns:
          Hidden states of shape (B, T, D), or (N, 1, D) for `only`, in the compute dtype.

        Raises:
          LoraxError: without `position_ids_BxT`, T exceeds the model's positions.
        """
        x_BxTxD = self.embeddings(input_ids_BxT, token_type_ids_BxT, position_ids_BxT, rngs)
        mask_BxTxS = may_attend(attention_mask_BxT)
        call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        *layers, last = self.layers
        for layer in layers:
            x_BxTxD = call(layer, x_BxTxD, mask_BxTxS, rngs)
        return call(last, x_BxTxD, mask_BxTxS, rngs, only)


_LAYER = r"encoder\.layers\.(\d+)"


def _rules(base: str, dense: str, out: str) -> tuple[Rule, ...]:
    """BERT's names in a model whose base is called `base`, and those of its head."""
    layer = rf"{base}.encoder.layer.\1"
    return (
        Rule(
            r"encoder\.embeddings\.(word|position|token_type)", rf"{base}.embeddings.\1_embeddings"
        ),
        Rule(r"encoder\.embeddings\.norm", f"{base}.embeddings.LayerNorm"),
        Rule(r"encoder\.embeddings\.project", f"{base}.embeddings_project"),
        Rule(rf"{_LAYER}\.attention\.(query|key|value)", rf"{layer}.attention.self.\2"),
        Rule(rf"{_LAYER}\.attention\.out", f"{layer}.attention.output.dense"),
        Rule(rf"{_LAYER}\.attention\.norm", f"{layer}.attention.output.LayerNorm"),
        Rule(rf"{_LAYER}\.mlp\.up", f"{layer}.intermediate.dense"),
        Rule(rf"{_LAYER}\.mlp\.down", f"{layer}.output.dense"),
        Rule(rf"{_LAYER}\.mlp\.norm", f"{layer}.output.LayerNorm"),
        Rule(r"head\.dense", dense),
        Rule(r"head\.out", out),
    )


_DISTILBERT_RULES = (
    Rule(r"encoder\.embeddings\.(word|position)", r"distilbert.embeddings.\1_embeddings"),
    Rule(r"encoder\.embeddings\.norm", "distilbert.embeddings.LayerNorm"),
    Rule(rf"{_LAYER}\.attention\.query", r"distilbert.transformer.layer.\1.attention.q_lin"),
    Rule(rf"{_LAYER}\.attention\.key", r"distilbert.transformer.layer.\1.attention.k_lin"),
    Rule(rf"{_LAYER}\.attention\.value", r"distilbert.transformer.layer.\1.attention.v_lin"),
    Rule(rf"{_LAYER}\.attention\.out", r"distilbert.transformer.layer.\1.attention.out_lin"),
    Rule(rf"{_LAYER}\.attention\.norm", r"distilbert.transformer.layer.\1.sa_layer_norm"),
    Rule(rf"{_LAYER}\.mlp\.up", r"distilbert.transformer.layer.\1.ffn.lin1"),
    Rule(rf"{_LAYER}\.mlp\.down", r"distilbert.transformer.layer.\1.ffn.lin2"),
    Rule(rf"{_LAYER}\.mlp\.norm", r"distilbert.transformer.layer.\1.output_layer_norm"),
    Rule(r"head\.dense", "pre_classifier"),
    Rule(r"head\.out", "classifier"),
)
_UNNEEDED = (
    r"(cls|lm_head|pooler|classifier|qa_outputs|pre_classifier|vocab_\w+|generator_\w+"
    r"|discriminator_\w+)\..+|(.+\.)?position_ids|embeddings\.token_type_ids"
)


def _roberta(pad_token: int = 1) -> Family:
    return Family(
        config=BertConfig,
        network=Encoder,
        rules=_rules("roberta", "classifier.dense", "classifier.out_proj"),
        prefix="roberta",
        pooler=Pooler(jnp.tanh, drops_before=True),
        head=("classifier",),
        unneeded=_UNNEEDED,
        pad_token=pad_token,
    )


FAMILIES = {
    "bert": Family(
        config=BertConfig,
        network=Encoder,
        rules=_rules("bert", "bert.pooler.dense", "classifier"),
        prefix="bert",
        pooler=Pooler(jnp.tanh),
        head=("classifier", "pooler"),
        unneeded=_UNNEEDED,
    ),
    "roberta": _roberta(),
    "xlm-roberta": _roberta(),
    "camembert": _roberta(),
    "electra": Family(
        config=BertConfig,
        network=Encoder,
        rules=_rules("electra", "classifier.dense", "classifier.out_proj"),
        prefix="electra",
        pooler=Pooler(ACTIVATIONS["gelu"], drops_before=True),
        head=("classifier",),
        unneeded=_UNNEEDED,
    ),
    "distilbert": Family(
        config=BertConfig,
        network=Encoder,
        rules=_DISTILBERT_RULES,
        prefix="distilbert",
        pooler=Pooler(jax.nn.relu),
        head=("classifier", "pre_classifier"),
        unneeded=_UNNEEDED,
    ),
}
