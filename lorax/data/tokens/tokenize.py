import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from lorax.data.examples import Examples
from lorax.errors import LoraxError, one_line

BROKEN = "the tokenizer cannot encode texts: its tokenizer.json is damaged or incomplete"


@dataclass(frozen=True, eq=False)
class Encoded:
    """A split as token ids, not padded.

    Attributes:
      input_ids: N arrays of int32, special tokens included.
      token_type_ids: N arrays of int32, the same lengths. For documents: 1 for a target token, 0
        for a given one.
      labels: (N,) int32 class ids, or float32 scores; zeros for documents.
    """

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) int32 tokens of each example."""
        return np.asarray([len(ids) for ids in self.input_ids], np.int32)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Encoded":
        """The examples at `indices`, in that order."""
        return Encoded(
            [self.input_ids[i] for i in indices],
            [self.token_type_ids[i] for i in indices],
            self.labels[np.asarray(indices)],
        )


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
    """Load a `tokenizer.json`, without the padding and truncation that it may specify.

    Args:
      source: the file, or a folder that holds it.

    Raises:
      LoraxError: no such file, or not a tokenizer.
    """
    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise LoraxError(f"{path}: no such file; model.source needs a tokenizer.json")
    with refusing(f"{path}: not a tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def refusing(fault: str) -> Iterator[None]:
    """Convert bare exceptions and panics of the Rust library to a `LoraxError`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LoraxError(f"{fault} ({one_line(error)})") from error


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest token id of any text, added and special tokens included; -1 without tokens.

    Ids need not be consecutive: a vocabulary of 30,000 tokens may go up to 50,000.
    """
    with refusing(BROKEN):
        specials = tokenizer.encode("", "").ids  # may be in the post-processor only
    return max((*tokenizer.get_vocab(with_added_tokens=True).values(), *specials), default=-1)


def encode(tokenizer: Tokenizer, examples: Examples, max_length: int) -> Encoded:
    """Tokenize a split; leaves `tokenizer` without truncation.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: texts or pairs of texts.
      max_length: maximum tokens per example, special tokens included; the longer text of a pair
        is truncated first.

    Raises:
      LoraxError: `max_length` leaves no room for a token of each text.
    """
    is_pair = examples.second is not None
    least = tokenizer.num_special_tokens_to_add(is_pair) + 1 + is_pair
    if max_length < least:
        raise LoraxError(f"task.max_length={max_length} is too short: at least {least} is needed")
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    second = examples.second
    inputs = examples.first if second is None else list(zip(examples.first, second, strict=True))
    with refusing(BROKEN):
        encodings = tokenizer.encode_batch_fast(inputs)
    tokenizer.no_truncation()
    return Encoded(
        [np.asarray(e.ids, np.int32) for e in encodings],
        [np.asarray(e.type_ids, np.int32) for e in encodings],
        examples.labels,
    )


def without_end(encoding: Encoding) -> list[int]:
    """The ids without the special tokens that the tokenizer adds after the text."""
    ids, added = encoding.ids, encoding.special_tokens_mask
    end = len(ids)
    while end and added[end - 1]:
        end -= 1
    return ids[: end or len(ids)]
