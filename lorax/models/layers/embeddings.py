"""Word embeddings that serve as an output layer, and the limit of position embeddings.

Shapes in names: B rows, T tokens, D width, V words.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.errors import LoraxError


class WordTable(nnx.Embed):
    """Word embeddings that may serve as the output layer, too."""

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """(..., D) -> float32 logits (..., V), by a product in the dtype of the query."""
        del out_sharding
        table_VxD = self.embedding[...].astype(query.dtype)
        return jnp.einsum("...d,vd->...v", query, table_VxD, preferred_element_type=jnp.float32)


def check_length(ids_BxT: jax.Array, longest: int) -> None:
    """Refuses rows of more tokens than a model has positions.

    Raises:
      LoraxError: saying which setting to change.
    """
    if ids_BxT.shape[1] > longest:
        raise LoraxError(
            f"sequence of {ids_BxT.shape[1]} tokens: this model has {longest} positions; "
            f"set task.max_length to {longest} or less"
        )
