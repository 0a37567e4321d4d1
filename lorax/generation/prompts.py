"""Batches prompts into few shapes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from lorax.data.batches.packing import round_up
from lorax.data.tokens.tokenize import without_end
from lorax.errors import LoraxError
from lorax.generation.program import Prompts

BUCKET = 32  # lengths are rounded up to a multiple, so that unlike prompts share a program
_LEAST = 0.75  # of a model's words that its tokenizer knows; tables are padded by a few


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer of another model, judged by its size, or one that changes prompts.

    Raises:
      LoraxError: it has more words than the model, or far fewer; it truncates or pads texts.
    """
    if tokenizer.truncation or tokenizer.padding:
        raise LoraxError(
            "the tokenizer cuts or pads prompts: call its no_truncation() and no_padding(), or "
            "take lorax.data.load_tokenizer"
        )
    words = tokenizer.get_vocab_size()
    if not _LEAST * vocab_size <= words <= vocab_size:
        raise LoraxError(
            f"the tokenizer has {words} words and the model {vocab_size}: "
            "give the tokenizer of the model's own folder"
        )


def encode_prompts(
    prompts: Sequence[Any], tokenizer: Tokenizer | None, vocab_size: int, most: int
) -> list[list[int]]:
    """Token ids of prompts that are texts or ids.

    Args:
      prompts: texts, or sequences of ids.
      tokenizer: of the model; texts need it.
      vocab_size: ids are below it.
      most: tokens that a prompt may have.

    Raises:
      LoraxError: naming the first prompt that cannot be served.
    """
    if isinstance(prompts, str):
        raise LoraxError("prompts are one text: give a list of texts")
    if not isinstance(prompts, Iterable):
        raise LoraxError(f"prompts={prompts!r}: give a list of texts, or of lists of token ids")
    found = [_encode(n, prompt, tokenizer) for n, prompt in enumerate(prompts)]
    for n, ids in enumerate(found):
        if not ids:
            raise LoraxError(f"prompt {n} is empty: begin it with the model's BOS token")
        if wrong := [token for token in ids if not 0 <= token < vocab_size]:
            last = vocab_size - 1
            raise LoraxError(f"prompt {n} has id {wrong[0]}; this model's are 0 to {last}")
        if len(ids) > most:
            raise LoraxError(
                f"prompt {n} of {len(ids)} tokens leaves no room for the new ones: at most {most} "
                "fit this model's positions; shorten it, or lower max_new_tokens"
            )
    return found


def _encode(n: int, prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise LoraxError(f"prompt {n} is a text: give a tokenizer, or token ids")
        return without_end(tokenizer.encode(prompt))
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of unlike lengths within it
        ids = np.asarray(None)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise LoraxError(f"prompt {n} is neither a text nor a sequence of token ids")
    return ids.tolist()


def batches(
    ids: list[list[int]], batch_size: int, max_length: int, copies: int = 1
) -> Iterator[Prompts]:
    """Batches of prompts of similar lengths, padded on the left; the last batch is filled up.

    Args:
      ids: of every prompt.
      batch_size: rows a batch; fewer prompts take the next power of two.
      max_length: the model's positions; no batch is longer.
      copies: rows of each prompt.
    """
    rows = min(batch_size, power_of_two(len(ids) * copies))
    shortest_first = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    order = [(n, copy) for n in shortest_first for copy in range(copies)]
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        columns = min(round_up(max(len(ids[n]) for n, _ in members), BUCKET), max_length)
        ids_BxP = np.zeros((rows, columns), np.int32)
        mask_BxP = np.zeros((rows, columns), np.int32)
        for row, (n, _) in enumerate(members):
            ids_BxP[row, columns - len(ids[n]) :] = ids[n]
            mask_BxP[row, columns - len(ids[n]) :] = 1
        filled = members + [(0, 0)] * (rows - len(members))
        row_B, copy_B = np.array(filled, np.int32).T
        arrays = ids_BxP, mask_BxP, row_B, copy_B, np.arange(rows) < len(members)
        yield Prompts(*map(jnp.asarray, arrays))


def power_of_two(count: int) -> int:
    """The next power of two.

    >>> power_of_two(1), power_of_two(2), power_of_two(5)
    (1, 2, 8)
    """
    return 1 << max(count - 1, 0).bit_length()
