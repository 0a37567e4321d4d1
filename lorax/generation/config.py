"""The options of `generate`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from lorax.errors import LoraxError

_COLDEST = 1e-30  # logits divided by less would overflow float32
_HARSHEST = 1000  # penalized logits stay within float32
_STEEPEST = 40  # powers of lengths stay within float64


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number from `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_real(value: Any, least: float = -math.inf) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= least


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# What each option has to be, and the test of it.
_RIGHT: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("a whole number from 1", lambda x: is_whole(x, 1)),
    "temperature": (
        f"0 (greedy) or a number from {_COLDEST}",
        lambda x: _is_real(x) and (x == 0 or x >= _COLDEST),
    ),
    "top_k": ("a whole number from 1, or 0 for all words", lambda x: is_whole(x, 0)),
    "top_p": ("in (0, 1]", lambda x: _is_real(x, 0) and 0 < x <= 1),
    "num_beams": ("a whole number from 1", lambda x: is_whole(x, 1)),
    "length_penalty": (
        f"a number from -{_STEEPEST} to {_STEEPEST}",
        lambda x: _is_real(x, -_STEEPEST) and x <= _STEEPEST,
    ),
    "early_stopping": ("True, False or 'never'", lambda x: isinstance(x, bool) or x == "never"),
    "repetition_penalty": (
        f"a number from {1 / _HARSHEST} to {_HARSHEST}",
        lambda x: _is_real(x, 1 / _HARSHEST) and x <= _HARSHEST,
    ),
    "min_new_tokens": ("a whole number from 0", lambda x: is_whole(x, 0)),
    "num_return_sequences": ("a whole number from 1", lambda x: is_whole(x, 1)),
    "no_repeat_ngram_size": ("a whole number from 1, or 0 for off", lambda x: is_whole(x, 0)),
    "eos_token_id": ("one id or several", lambda ids: all(is_whole(x, 0) for x in _several(ids))),
    "stop": (
        "one text or several",
        lambda texts: all(isinstance(x, str) and x for x in _several(texts)),
    ),
}


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated, in the names and by the definitions of Hugging Face transformers.

    Attributes:
      max_new_tokens: most tokens a row, the one that ends it included.
      temperature: divides the logits before a draw; 0 takes the most probable token.
      top_k: draw from the k most probable words; 0: from all.
      top_p: draw from the fewest most probable words whose probabilities sum to it (Holtzman et
        al. 2020, arXiv:1904.09751).
      num_beams: hypotheses of a beam search; 1: no search.
      length_penalty: a search ranks by log-probability / length ** length_penalty: above 0
        favours long ones.
      early_stopping: a search of a row ends, once it has `num_beams` ended hypotheses: True: at
        once; False: when the best open one would not enter them if it ended now; "never": when
        it could not by any length.
      no_repeat_ngram_size: no n-gram of this size comes twice, the prompt's included; 0: off.
      eos_token_id: ids that end a row.
      stop: texts that end a row, where they are in what is generated; the text returned ends
        before them. They need a tokenizer.
      repetition_penalty: scores of tokens that came before, the prompt's included, are divided by
        it if positive, else multiplied (Keskar et al. 2019, arXiv:1909.05858); 1: off.
      min_new_tokens: no id of `eos_token_id` comes before so many new tokens.
      num_return_sequences: completions of each prompt: draws, or a search's best hypotheses.

    Raises:
      LoraxError: naming the option whose value is not served.

    >>> GenerationConfig(top_p=1.5)
    Traceback (most recent call last):
    lorax.errors.LoraxError: top_p=1.5 is not in (0, 1]
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    eos_token_id: int | tuple[int, ...] = ()
    stop: str | tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for name, (right, is_right) in _RIGHT.items():
            if not is_right(value := getattr(self, name)):
                raise LoraxError(f"{name}={value!r} is not {right}")
        if self.num_beams > 1 and self.temperature:
            raise LoraxError(
                f"num_beams={self.num_beams} searches, temperature={self.temperature} samples: "
                "set num_beams=1 or temperature=0"
            )
        if self.num_beams > 1 and self.stops:
            raise LoraxError(
                f"stop={self.stop!r} is not served with num_beams={self.num_beams}: "
                "set num_beams=1, or end by eos_token_id"
            )

        if self.min_new_tokens > self.max_new_tokens:
            raise LoraxError(
                f"min_new_tokens={self.min_new_tokens} is above "
                f"max_new_tokens={self.max_new_tokens}: lower it"
            )
        several = self.num_return_sequences
        if several > 1 and self.num_beams == 1 and not self.temperature:
            raise LoraxError(
                f"num_return_sequences={several} would be equal, as temperature=0 draws nothing: "
                f"set a temperature, or num_beams={several}"
            )
        if self.num_beams > 1 and several > self.num_beams:
            raise LoraxError(
                f"num_return_sequences={several} is above num_beams={self.num_beams}, the "
                "hypotheses that a search has: raise num_beams"
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """`eos_token_id`, one or several."""
        return _several(self.eos_token_id)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop`, one or several."""
        return _several(self.stop)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "GenerationConfig":
        """From options by name.

        Raises:
          LoraxError: an option that is not served, or a value that is not.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise LoraxError(
                f"{unknown[0]!r} is no option of generation; they are: {', '.join(known)}"
            )
        return cls(**options)
