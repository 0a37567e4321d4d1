"""The loss and the scores of a causal language model: its predictions of target tokens.

Shapes in names: B rows, T tokens, N examples.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.models import Prefix, sum_by_sequence

COLUMNS = ("loss", "tokens", "hits")


def next_tokens(
    ids_BxT: jax.Array, targets_BxT: jax.Array, numbers_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each token's successor, and whether it is a target.

    Args:
      ids_BxT: token ids.
      targets_BxT: 1 on target tokens, such as a completion's; 0 on a prompt's.
      numbers_BxT: number of the example that a token belongs to, from 1; 0 is padding.

    Returns:
      Ids and a mask, (B, T) each. The first token of an example is never a target.
    """
    following_BxT = jnp.roll(numbers_BxT, -1, axis=1).at[:, -1].set(0)
    is_target_BxT = (jnp.roll(targets_BxT, -1, axis=1) != 0) & (following_BxT == numbers_BxT)
    return jnp.roll(ids_BxT, -1, axis=1), is_target_BxT & (numbers_BxT != 0)


def score_examples(
    model: Any,
    batch: dict[str, jax.Array],
    rngs: nnx.Rngs | None,
    smoothing: float = 0.0,
    prefix: Prefix | None = None,
) -> jax.Array:
    """(summed loss in nats, number of target tokens, hits) of each example: (N, 3).

    Args:
      model: a `CausalLM`, adapted or not.
      batch: as `lorax.data.collate` or `lorax.data.pad` makes it, of documents: its
        `token_type_ids` mark the target tokens.
      rngs: stream `dropout` turns dropout on.
      smoothing: of the targets.
      prefix: see `CausalLM.score`.
    """
    count = batch["weights"].shape[0]
    numbers_BxT = batch.get("segment_ids")
    if numbers_BxT is None:
        numbers_BxT = batch["attention_mask"] * jnp.arange(1, count + 1)[:, None]
    ids_BxT = batch["input_ids"]
    labels_BxT, is_target_BxT = next_tokens(ids_BxT, batch["token_type_ids"], numbers_BxT)
    scores = model.score(
        ids_BxT,
        numbers_BxT,
        labels_BxT,
        position_ids_BxT=batch.get("position_ids"),
        rngs=rngs,
        smoothing=smoothing,
        prefix=prefix,
    )
    weights_BxT = is_target_BxT.astype(jnp.float32)
    columns = (scores.losses * weights_BxT, weights_BxT, scores.hits * weights_BxT)
    return sum_by_sequence(jnp.stack(columns, axis=-1), numbers_BxT, count)[0]
