"""Converts adapters of the parts of a fused linear layer to one of the whole, and back.

GPT-2's `c_attn` computes queries, keys and values at once. The update of its part n is B_n A_n.
The update of the whole is B A: the A's are stacked, and each B_n is in its own rows (its part of
the outputs) and columns (its A's), zero elsewhere. Parts that share an A share its columns.
"""

from collections.abc import Mapping

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


def fuse(pairs: Mapping[int, Pair], of: int) -> Pair:
    """The pair of a layer of `of` equal parts, of which `pairs` are adapted.

    Args:
      pairs: A (r, d_in) and B (d_out, r) by the part's number, from 0; ranks may differ.
      of: how many parts the layer has.

    Returns:
      A (R, d_in) and B (of d_out, R); R is the sum of the ranks of all A that are not equal.

    >>> q, v = (np.ones((1, 2)), np.ones((3, 1))), (np.zeros((2, 2)), np.ones((3, 2)))
    >>> a, b = fuse({0: q, 2: v}, 3)
    >>> a.shape, b[[0, 3, 6]].tolist()
    ((3, 2), [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    """
    distinct: list[np.ndarray] = []
    for a, _ in pairs.values():
        if not any(_equal(a, other) for other in distinct):
            distinct.append(a)
    starts = np.cumsum([0, *map(len, distinct)])
    d_out = len(next(iter(pairs.values()))[1])
    whole = np.zeros((of * d_out, starts[-1]), np.float32)
    for n, (a, b) in pairs.items():
        start = next(s for s, other in zip(starts, distinct, strict=False) if _equal(a, other))
        whole[n * d_out : (n + 1) * d_out, start : start + len(a)] = b
    return np.concatenate(distinct), whole


def _equal(a: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(a, other, equal_nan=True)


def cut(pair: Pair, n: int, of: int) -> Pair:
    """The pair of the n-th of `of` equal parts: all parts share A.

    >>> cut((np.ones((1, 2)), np.arange(3.0)[:, None]), 1, 3)[1].tolist()
    [[1.0]]
    """
    a, b = pair
    return a, np.split(b, of)[n]
