"""Losses of next tokens, some columns at a time: the logits of all tokens never exist at once.

Shapes in names: B rows, T tokens, C tokens of a part, P parts, D width, V words.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

MOST_LOGITS = 2**24  # in float32 64 MiB, and as much again for their gradient


class TokenScores(NamedTuple):
    """How well each token was predicted.

    Attributes:
      losses: cross-entropy in nats, (B, T) float32.
      hits: whether no token was likelier than the right one, (B, T) float32.
    """

    losses: jax.Array
    hits: jax.Array


def token_scores(
    logits_of: Callable[[jax.Array], jax.Array],
    x_BxTxD: jax.Array,
    labels_BxT: jax.Array,
    vocab_size: int,
    *,
    smoothing: float = 0.0,
    most_logits: int = MOST_LOGITS,
) -> TokenScores:
    """Scores labels by the logits of hidden states.

    Beyond `most_logits` the columns are taken part by part, and a part's logits are computed once
    more in the backward pass.

    Args:
      logits_of: from (B, C, D) to float32 logits (B, C, V).
      x_BxTxD: hidden states.
      labels_BxT: the tokens to come.
      vocab_size: V.
      smoothing: share of each target that is spread evenly over all words.
      most_logits: entries of logits that may exist at once; a column of all rows always does.
    """

    def score(x_BxCxD: jax.Array, labels_BxC: jax.Array) -> TokenScores:
        logits_BxCxV = logits_of(x_BxCxD)
        losses_BxC = smoothed_losses(logits_BxCxV, labels_BxC, smoothing)
        own_BxC = jnp.take_along_axis(logits_BxCxV, labels_BxC[..., None], axis=-1)[..., 0]
        hits_BxC = own_BxC >= logits_BxCxV.max(-1)  # the loss needs the maximum, too
        return TokenScores(losses_BxC, hits_BxC.astype(jnp.float32))

    rows, tokens = labels_BxT.shape
    width = max(1, most_logits // (rows * vocab_size))
    if width >= tokens:
        return score(x_BxTxD, labels_BxT)
    parts = -(-tokens // width)

    def cut(x: jax.Array) -> jax.Array:
        missing = [(0, 0), (0, parts * width - tokens)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, missing).reshape(rows, parts, width, *x.shape[2:]), 1, 0)

    columns = cut(x_BxTxD), cut(labels_BxT)
    scores_PxBxC = jax.lax.map(lambda part: jax.checkpoint(score)(*part), columns)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :tokens], scores_PxBxC)


def smoothed_losses(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy of (..., V) logits with a share of each target spread over all V.

    Szegedy et al. 2016 (arXiv:1512.00567), section 7; 0 is the plain cross-entropy.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    even = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
    return (1 - smoothing) * losses + smoothing * even
