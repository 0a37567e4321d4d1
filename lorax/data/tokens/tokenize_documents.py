"""Documents as token ids, with the target tokens marked."""

import logging
from collections.abc import Sequence
from itertools import repeat

import numpy as np
from tokenizers import Encoding, Tokenizer

from lorax.data.documents import Documents, Span
from lorax.data.tokens.tokenize import BROKEN, Encoded, refusing, without_end
from lorax.errors import LoraxError

_log = logging.getLogger(__name__)


def encode_documents(
    tokenizer: Tokenizer, documents: Documents, max_length: int, *, eos_id: int | None = None
) -> Encoded:
    """Tokenize whole documents; leaves `tokenizer` without truncation.

    A token is a target if it has any character of a target span. The first token never is, as no
    token precedes it. A document that ends with a target gets the end-of-text token, also as a
    target, unless it has it already. Documents are truncated at `max_length`, and a document
    without a target before that is left out. Texts of the form `text` are split into blocks
    instead, each with the tokenizer's special tokens and without an added end-of-text; a last
    block of a single token is left out.

    Args:
      tokenizer: from `load_tokenizer`.
      documents: N texts with their targets.
      max_length: maximum tokens of a document or a block, special tokens included.
      eos_id: the end-of-text token; None appends none.

    Returns:
      At most N documents, or all blocks; `token_type_ids` are 1 for target tokens.

    Raises:
      LoraxError: `max_length` leaves no room, or no target is left.
    """
    least = tokenizer.num_special_tokens_to_add(False) + 2
    if max_length < least:
        raise LoraxError(f"task.max_length={max_length} is too short: at least {least} is needed")
    if documents.form == "text":
        pairs = _blocks(tokenizer, documents.texts, max_length)
    else:
        pairs = _cut(tokenizer, documents, max_length, eos_id)
    kept = [(ids, marks) for ids, marks in pairs if marks.any()]
    if not kept:
        raise LoraxError(
            f"no token to be predicted is left in {len(documents)} documents cut at "
            f"task.max_length={max_length}: take more, or longer texts"
        )
    return Encoded(
        [np.asarray(ids, np.int32) for ids, _ in kept],
        [marks.astype(np.int32) for _, marks in kept],
        np.zeros(len(kept), np.int32),
    )


def warn_of_dropped(documents: Documents, encoded: Encoded, max_length: int) -> None:
    """Log the number of documents that `encode_documents` left out, if any."""
    dropped = len(documents) - len(encoded)
    if documents.form != "text" and dropped:
        _log.warning(
            "%d of %d documents are left out: nothing to be predicted is before task.max_length=%d",
            dropped,
            len(documents),
            max_length,
        )


def _blocks(
    tokenizer: Tokenizer, texts: list[str], max_length: int
) -> list[tuple[list[int], np.ndarray]]:
    tokenizer.enable_truncation(max_length)
    with refusing(BROKEN):
        firsts = tokenizer.encode_batch(texts)
    tokenizer.no_truncation()
    blocks = [without_end(block) for first in firsts for block in (first, *first.overflowing)]
    return [(ids, np.arange(len(ids)) > 0) for ids in blocks]


def _cut(
    tokenizer: Tokenizer, documents: Documents, max_length: int, eos_id: int | None
) -> list[tuple[list[int], np.ndarray]]:
    tokenizer.no_truncation()
    adds = documents.form == "prompt"
    with refusing(BROKEN):
        encodings = tokenizer.encode_batch(documents.texts, add_special_tokens=adds)
    marked = map(_marked, encodings, documents.texts, documents.targets, repeat(eos_id))
    return [(ids[:max_length], marks[:max_length]) for ids, marks in marked]


def _marked(
    encoding: Encoding, text: str, spans: tuple[Span, ...], eos_id: int | None
) -> tuple[list[int], np.ndarray]:
    """The ids of a document, and which of them are targets."""
    ids, (starts, ends) = encoding.ids, _extents(encoding)
    marks = _touch(starts, ends, spans)
    if eos_id is not None and any(start < end == len(text) for start, end in spans):
        end = len(text.rstrip())
        last = [ids[n] for n in np.flatnonzero(_touch(starts, ends, [(end - 1, end)]))]
        if ids[-1:] == [eos_id]:  # from the text, or the tokenizer's post-processor
            marks[-1] = True
        elif eos_id not in last:
            ids, marks = [*ids, eos_id], np.append(marks, True)
    marks[:1] = False
    return ids, marks


def _touch(starts: np.ndarray, ends: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    touched = np.zeros(len(starts), bool)
    for start, end in spans:
        touched |= (starts < end) & (ends > start) & (start < end)
    return touched


def _extents(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """The start and the end of each token, in characters.

    A byte-level tokenizer may trim blanks from its offsets. A token of blanks only then keeps
    just its end, and starts where the previous token ends.
    """
    starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], np.maximum.accumulate(ends)])[:-1]
    is_blank = (starts == ends) & (np.asarray(encoding.special_tokens_mask) == 0)
    return np.where(is_blank, before, starts), ends
