"""What tells the models of one Hugging Face `model_type` apart: a config, a network, its names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp

from lorax.errors import LoraxError, brief
from lorax.models.options import check_option


@dataclass(frozen=True)
class Rule:
    """The Hugging Face name of some of our modules.

    Attributes:
      ours: regex over a module's whole path.
      theirs: template of the name, with the regex's groups.
      part: (n, of): ours is the n-th of so many equal parts of theirs, along the outputs.
      transposed: theirs stores kernels as (outputs, inputs), as `torch.nn.Linear` does.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None
    transposed: bool = True


@dataclass(frozen=True)
class Pooler:
    """The dense layer between the first token and the output layer of theirs.

    Attributes:
      activation: after it.
      drops_before: whether dropout acts on its input.
      drops_after: whether dropout acts on its output.
    """

    activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    drops_before: bool = False
    drops_after: bool = True


@dataclass(frozen=True)
class Family:
    """The models of a `model_type`.

    Attributes:
      config: a frozen dataclass with `from_hf`.
      network: the NNX class of the base, made from a config.
      rules: the names of all modules; of several rules that match, the first counts.
      prefix: what the base's names begin with in a model with a head.
      pooler: how its sequence classifier pools; None: it has none here.
      head: modules of theirs that PEFT saves with a classifier's adapter.
      unneeded: regex of weights that a checkpoint may hold and the model does without.
      pad_token: where the config does not say.
    """

    config: Any
    network: Any
    rules: tuple[Rule, ...]
    prefix: str
    pooler: Pooler | None = None
    head: tuple[str, ...] = ()
    unneeded: str = r"(cls|lm_head|pooler|classifier|qa_outputs)\..+|(.+\.)?position_ids"
    pad_token: int = 0

    @property
    def is_decoder(self) -> bool:
        """Whether tokens attend to those before them alone."""
        return self.pooler is None


def read_config(
    cls: Any,
    config: Mapping[str, Any],
    *,
    served: Mapping[str, tuple[Any, ...]],
    names: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """The fields of a config's dataclass out of a Hugging Face `config.json`.

    Args:
      cls: the dataclass; its fields are named as in `config.json`, and their annotations say which
        values they may have (`lorax.models.options`).
      config: the dict of `config.json`; a null is an absence.
      served: options that change the computation, and the values served, the default first.
      names: field to its names in `config.json`, where these are others: of several that are given,
        the first counts. An empty tuple: it is not read.

    Raises:
      LoraxError: an option with a value that is not served, of the wrong type or out of range, or
        a size that is absent.
    """
    config = {k: v for k, v in config.items() if v is not None}
    for option, values in served.items():
        if (value := config.get(option, values[0])) not in values:
            known = ", ".join(map(str, values))
            raise LoraxError(f"config.json: {option}={brief(value)} is not one of: {known}")
    kinds = get_type_hints(cls, include_extras=True)
    found, absent = {}, []
    for field in fields(cls):
        theirs = (names or {}).get(field.name, (field.name,))
        name = next((name for name in theirs if name in config), None)
        if name is not None:
            check_option(name, config[name], kinds[field.name])
            found[field.name] = config[name]
        elif _is_needed(field):
            absent.append(theirs[-1])
    if absent:
        kind = config.get("model_type", "BERT")
        raise LoraxError(f"config.json: no {', '.join(absent)}; is it a {kind}?")
    return found


def check_sizes(config: Any) -> None:
    """Refuses sizes that do not fit together.

    Raises:
      LoraxError: naming both.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise LoraxError(f"hidden_size={width} is no multiple of num_attention_heads={heads}")
    if (pad := getattr(config, "pad_token_id", 0)) >= config.vocab_size:
        raise LoraxError(f"pad_token_id={pad} is not below vocab_size={config.vocab_size}")
    if config.max_length < 1:
        positions = config.max_position_embeddings
        raise LoraxError(f"max_position_embeddings={positions} leaves no position for a token")


def _is_needed(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def rule_of(rules: tuple[Rule, ...], module: str) -> tuple[Rule, str] | None:
    """The rule of a module of ours, and its name in theirs; None: there is none."""
    for rule in rules:
        if match := re.fullmatch(rule.ours, module):
            return rule, match.expand(rule.theirs)
    return None


def dropout_rates(config: Any) -> dict[str, float | None]:
    """The fields of a family's config that are rates of dropout."""
    names = [field.name for field in fields(config) if "drop" in field.name]
    return {name: getattr(config, name) for name in names}


def with_dropout(config: Any, rate: float) -> Any:
    """The config with all rates of dropout replaced.

    Raises:
      LoraxError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise LoraxError(f"model.dropout={rate} is not in [0, 1)")
    return replace(config, **dict.fromkeys(dropout_rates(config), rate))
