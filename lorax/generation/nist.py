"""NIST's score of texts against references."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

Tokens = Sequence[str]


def corpus_nist(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 5
) -> float:
    """NIST of a corpus: matched n-grams weigh by their information; no upper bound.

    The information of an n-gram is log2(count of its first n - 1 words / its own count) over all
    references (Doddington 2002, equation 2). For each n up to `order`, the matches' information is
    divided by the hypotheses' n-grams; the sum is scaled by a penalty of 1/2 at a length of 2/3.

    Like mteval-v13a, an n-gram matches as often as it stands in the reference that has most of it.
    Like the E2E challenge's Python version, a text's reference length is the mean over its own
    references. NLTK's function of the same name takes each text's best reference instead.

    Args:
      hypotheses: the tokens of each text.
      references: for each text, the tokens of its references, one or more.
      order: the longest n-gram.

    >>> corpus_nist(["a b c d".split()], [["a b c d".split()]])  # log2(4), then 0: b follows from a
    2.0
    """
    counts = Counter(
        gram
        for refs in references
        for ref in refs
        for n in range(order + 1)
        for gram in _ngrams(ref, n)
    )
    score = 0.0
    for n in range(1, order + 1):
        information, total = 0.0, 0
        for hypothesis, refs in zip(hypotheses, references, strict=True):
            grams = Counter(_ngrams(hypothesis, n))
            matches = grams & reduce(or_, (Counter(_ngrams(ref, n)) for ref in refs))
            total += grams.total()
            information += sum(
                k * math.log2(counts[gram[:-1]] / counts[gram]) for gram, k in matches.items()
            )
        score += information / max(total, 1)
    length = sum(map(len, hypotheses))
    expected = sum(sum(map(len, refs)) / len(refs) for refs in references)
    return score * _length_penalty(length, expected)


def _ngrams(tokens: Tokens, n: int) -> Iterable[tuple[str, ...]]:
    """Runs of n tokens; for n = 0 an empty one for each token, so that their count is the words."""
    return zip(*(tokens[i:] for i in range(n)), strict=False) if n else [()] * len(tokens)


def _length_penalty(length: int, expected: float) -> float:
    """Doddington 2002, equation 3: exp(-b log²(length / expected)), 1/2 at 2/3."""
    if length == 0 or length >= expected:
        return float(length > 0)
    beta = math.log(2) / math.log(1.5) ** 2
    return math.exp(-beta * math.log(length / expected) ** 2)
