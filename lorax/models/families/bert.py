"""BERT, RoBERTa (with XLM-R and CamemBERT), ELECTRA and DistilBERT encoders: configs and names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lorax.models.families.encoder import Encoder
from lorax.models.families.family import Family, Pooler, Rule, check_sizes, read_config
from lorax.models.layers.functions import ACTIVATIONS
from lorax.models.options import Count, Epsilon, Layers, Length, Rate, Size

# Options of a Hugging Face config that change the computation, and the values served here.
_SERVED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
# DistilBERT's names; of three sizes BERT's are taken, too, and go before, as in transformers.
_DISTILBERT = {
    "hidden_size": ("hidden_size", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "intermediate_size": ("hidden_dim",),
    "hidden_act": ("activation",),
    "hidden_dropout_prob": ("dropout",),
    "attention_probs_dropout_prob": ("attention_dropout",),
    "classifier_dropout": ("seq_classif_dropout",),
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

    vocab_size: Length
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    model_type: str = "bert"
    embedding_size: Size | None = None
    hidden_act: str = "gelu"
    max_position_embeddings: Length = 512
    type_vocab_size: Count = 2
    layer_norm_eps: Epsilon = 1e-12
    pad_token_id: Count = 0
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    classifier_dropout: Rate | None = None

    def __post_init__(self) -> None:
        check_sizes(self)

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
            found = read_config(cls, config, served=served, names=_DISTILBERT)
            fixed = {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
            return cls(**({"classifier_dropout": 0.2} | found | fixed))
        served["hidden_act"] = tuple(ACTIVATIONS)
        if model_type == "electra":  # an option of generation alone, which has no other effect
            served["summary_activation"] = ("gelu", config.get("summary_activation"))
        found = read_config(cls, config, served=served)
        absent: dict[str, Any] = {"pad_token_id": FAMILIES[model_type or "bert"].pad_token}
        if model_type == "electra":
            absent["embedding_size"] = 128  # of transformers
        return cls(**(absent | found))

    @property
    def first_position(self) -> int:
        """The row of the position table that a sequence's first token takes."""
        return self.pad_token_id + 1 if self.model_type in _COUNTS_FROM_PADDING else 0

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that has position embeddings."""
        return self.max_position_embeddings - self.first_position


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
