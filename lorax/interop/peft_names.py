"""Our modules in PEFT's names. Several of ours may be parts of one there: GPT-2's `c_attn`."""

from lorax.errors import LoraxError
from lorax.models.checkpoints.tensor_names import hf_module, is_transposed
from lorax.models.families import FAMILIES, family_of
from lorax.models.families.family import rule_of

PREFIX = "base_model.model."
WORDS = "decoder.word.embedding"  # may be the output layer, too
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}
_EMBEDDING_PARTS = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
_IN_A_LAYER = ("attention.query", "attention.key", "attention.value", "attention.out")
_IN_AN_MLP = ("mlp.gate", "mlp.up", "mlp.down")


def check_family(model_type: str) -> None:
    """Refuse a `model_type` that is not served."""
    if model_type not in FAMILIES:
        raise LoraxError(f"model_type={model_type!r} is not one of: {', '.join(FAMILIES)}")


def module_of(path: str) -> str:
    """The module that a kernel or an embedding is the parameter of."""
    return path.rpartition(".")[0]


def name_of(path: str, model_type: str, *, bare: bool) -> str:
    """The name of a module or parameter of ours in `BertModel` (`bare`), or in one with a head."""
    name = hf_module(path, model_type)
    return name.removeprefix(f"{family_of(model_type).prefix}.") if bare else name


def is_within(name: str, whole: str) -> bool:
    """Whether PEFT stores the module `name` when `modules_to_save` has `whole`.

    It goes by the end of a name alone: DistilBERT's `pre_classifier` is stored as a `classifier`.

    >>> is_within("bert.pooler.dense", "pooler"), is_within("pre_classifier", "classifier")
    (True, True)
    """
    return any(part.endswith(whole) for part in name.split("."))


def parts_of(path: str) -> dict[str, str]:
    """PEFT's names of A and B of the module whose parameter is at `path`."""
    return _EMBEDDING_PARTS if path.endswith(".embedding") else _PARTS


def fused_part(path: str, model_type: str) -> tuple[int, int] | None:
    """(n, of): which of how many equal parts of a fused module ours is; None: a whole one."""
    found = rule_of(family_of(model_type).rules, module_of(path))
    return found[0].part if found else None


def is_conv1d(path: str, model_type: str) -> bool:
    """Whether PEFT's module is a linear layer that stores its weight as (inputs, outputs)."""
    return path.endswith(".kernel") and not is_transposed(path, model_type)


def kinds(model_type: str) -> list[str]:
    """The names within a layer of all linear modules that it may have."""
    stack = "decoder" if family_of(model_type).is_decoder else "encoder"
    modules = [f"{stack}.layers.0.{name}" for name in (*_IN_A_LAYER, *_IN_AN_MLP)]
    known = [module for module in modules if rule_of(family_of(model_type).rules, module)]
    names = [hf_module(module, model_type).partition(".0.")[2] for module in known]
    return list(dict.fromkeys(names))
