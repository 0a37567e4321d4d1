"""Softmax attention with its backward pass written out.

Shapes in names: B rows, T tokens, S attended tokens, D width, H heads, K width of a head.
"""

import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.errors import LoraxError
from lorax.models.layers.functions import keep_mask

ATTENTIONS = ("einsum", "xla", "cudnn")

_LOWEST = float(np.finfo(np.float32).min)
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def check_attention(implementation: str, rate: float) -> None:
    """Refuses an implementation that is unknown or cannot drop attention weights.

    Raises:
      LoraxError: naming it.
    """
    if implementation not in ATTENTIONS:
        raise LoraxError(f"attention={implementation!r} is not one of: {', '.join(ATTENTIONS)}")
    if rate and implementation != "einsum":
        raise LoraxError(
            f"attention={implementation!r} cannot drop attention probabilities (rate {rate}): "
            "set model.dropout=0 or model.attention=einsum"
        )


def split_heads(x_BxTxD: jax.Array, heads: int) -> jax.Array:
    """(B, T, D) -> (B, T, H, K)."""
    return x_BxTxD.reshape(*x_BxTxD.shape[:2], heads, -1)


def may_attend(mask_BxT: jax.Array) -> jax.Array:
    """(B, T, S): to its own sequence's tokens; padding, as in transformers, to all of the row's."""
    query_BxTx1, key_Bx1xS = mask_BxT[:, :, None], mask_BxT[:, None, :]
    return (key_Bx1xS != 0) & ((query_BxTx1 == key_Bx1xS) | (query_BxTx1 == 0))


def attend(
    q_BxTxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxK: jax.Array,
    mask_BxTxS: jax.Array,
    *,
    bias_BxHxTxS: jax.Array | None = None,
    scale: float | None = None,
    implementation: str = "einsum",
    dropout_rate: float = 0.0,
    rngs: nnx.Rngs | None = None,
) -> jax.Array:
    """Softmax attention over the tokens where the mask is True; softmax in float32.

    A token that attends to none gets a finite value (the mean of `v`), and its gradient.

    Args:
      q_BxTxHxK: queries.
      k_BxSxHxK: keys; of fewer heads, each serves as many neighbouring heads of the queries
        (grouped-query attention, Ainslie et al. 2023).
      v_BxSxHxK: values, as many heads as the keys.
      mask_BxTxS: where to attend.
      bias_BxHxTxS: added to the logits, and differentiated.
      scale: of the products of queries and keys; None: 1 / sqrt(K).
      implementation: `einsum`, or `xla` or `cudnn` of `jax.nn.dot_product_attention`.
      dropout_rate: of the attention weights; with `einsum` alone.
      rngs: its stream `dropout` turns dropout on.

    Returns:
      Array of q's shape and dtype.
    """
    q, k, v, mask = q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask_BxTxS
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation != "einsum":
        named = cast(Literal["xla", "cudnn"], implementation)
        bias = None if bias_BxHxTxS is None else bias_BxHxTxS.astype(q.dtype)
        return jax.nn.dot_product_attention(
            q, k, v, bias, mask=mask[:, None], scale=scale, implementation=named
        )
    if (group := q.shape[2] // k.shape[2]) > 1:
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    keep = keep_mask((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dropout_rate, rngs)
    return _attention(dropout_rate, scale, q, k, v, bias_BxHxTxS, mask, keep)


def _plain(rate: float, scale: float, *inputs: jax.Array | None) -> jax.Array:
    return jax.vmap(functools.partial(_forward_row, rate, scale))(inputs)


_attention = jax.custom_vjp(_plain, nondiff_argnums=(0, 1))


def _attention_forward(rate: float, scale: float, *inputs: jax.Array | None) -> Any:
    # Forward over reverse goes through a plain function only.
    return _plain(rate, scale, *inputs), inputs


def _attention_backward(rate: float, scale: float, inputs: Any, grad: jax.Array) -> Any:
    return *jax.vmap(functools.partial(_backward_row, rate, scale))((inputs, grad)), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward_row(rate: float, scale: float, inputs: Any) -> jax.Array:
    q_TxHxK, k_SxHxK, v_SxHxK, bias_HxTxS, mask_TxS, keep_HxTxS = inputs
    q_HxTxK, k_HxSxK, v_HxSxK = _heads_first(q_TxHxK, k_SxHxK, v_SxHxK)
    e_HxTxS, share_HxTx1 = _weights(q_HxTxK, k_HxSxK, bias_HxTxS, mask_TxS, scale)
    kept_HxTxS = _dropped(e_HxTxS, keep_HxTxS, rate).astype(v_HxSxK.dtype)
    out_HxTxK = _einsum("hts,hsk->htk", kept_HxTxS, v_HxSxK) * share_HxTx1
    return jnp.swapaxes(out_HxTxK, 0, 1).astype(q_TxHxK.dtype)


def _backward_row(rate: float, scale: float, inputs_and_grad: Any) -> Any:
    """The gradients of a row's q, k, v and bias; the weights are computed again, or shared by XLA.

    The products that sum over T take an operand as (K, T), and a barrier lest XLA turn it back:
    on a CPU they need half the time that way.
    """
    (q_TxHxK, k_SxHxK, v_SxHxK, bias_HxTxS, mask_TxS, keep_HxTxS), dout_TxHxK = inputs_and_grad
    dtype = q_TxHxK.dtype
    q_HxTxK, k_HxSxK, v_HxSxK, dout_HxTxK = _heads_first(q_TxHxK, k_SxHxK, v_SxHxK, dout_TxHxK)
    e_HxTxS, share_HxTx1 = _weights(q_HxTxK, k_HxSxK, bias_HxTxS, mask_TxS, scale)
    dout_HxTxK = (dout_HxTxK.astype(jnp.float32) * share_HxTx1).astype(dtype)
    de_HxTxS = _dropped(_einsum("htk,hsk->hts", dout_HxTxK, v_HxSxK), keep_HxTxS, rate)
    mean_HxTx1 = (de_HxTxS * e_HxTxS).sum(-1, keepdims=True) * share_HxTx1
    dbias_HxTxS = e_HxTxS * (de_HxTxS - mean_HxTx1)
    dlogits_HxTxS = (dbias_HxTxS * scale).astype(dtype)
    kept_HxTxS = _dropped(e_HxTxS, keep_HxTxS, rate).astype(dtype)
    turned = jax.lax.optimization_barrier([jnp.swapaxes(x, 1, 2) for x in (q_HxTxK, dout_HxTxK)])
    q_HxKxT, dout_HxKxT = turned
    dq_HxTxK = _einsum("hts,hsk->htk", dlogits_HxTxS, k_HxSxK)
    dk_HxKxS = _einsum("hkt,hts->hks", q_HxKxT, dlogits_HxTxS)
    dv_HxKxS = _einsum("hkt,hts->hks", dout_HxKxT, kept_HxTxS)
    grads = jnp.swapaxes(dq_HxTxK, 0, 1), *(jnp.moveaxis(x, 2, 0) for x in (dk_HxKxS, dv_HxKxS))
    dbias = None if bias_HxTxS is None else dbias_HxTxS.astype(bias_HxTxS.dtype)
    return *(grad.astype(dtype) for grad in grads), dbias


def _heads_first(*arrays_TxHxK: jax.Array) -> list[jax.Array]:
    return [jnp.swapaxes(x, 0, 1) for x in arrays_TxHxK]


def _weights(q_HxTxK, k_HxSxK, bias_HxTxS, mask_TxS, scale) -> tuple[jax.Array, jax.Array]:
    """Softmax in two parts: exp(logits - their maximum), and one over its sum."""
    logits_HxTxS = _einsum("htk,hsk->hts", q_HxTxK, k_HxSxK) * scale
    if bias_HxTxS is not None:
        logits_HxTxS += bias_HxTxS.astype(jnp.float32)
    logits_HxTxS = jnp.where(mask_TxS[None], logits_HxTxS, _LOWEST)
    e_HxTxS = jnp.exp(logits_HxTxS - logits_HxTxS.max(-1, keepdims=True))
    return e_HxTxS, 1 / e_HxTxS.sum(-1, keepdims=True)


def _dropped(x_HxTxS: jax.Array, keep_HxTxS: jax.Array | None, rate: float) -> jax.Array:
    return x_HxTxS if keep_HxTxS is None else jnp.where(keep_HxTxS, x_HxTxS / (1 - rate), 0)
