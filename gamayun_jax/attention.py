"""Causal attention within segments: one function for training and decoding.

Shape suffixes: B batch, T query length, S key length, N query heads, K key-value
heads, G = N / K query heads per key-value head, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_segment_ids_BT: jax.Array,
    kv_segment_ids_BS: jax.Array,
    q_offset: jax.Array | int = 0,
    q_context_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention: softmax(q k^T / sqrt(H)) v.

    A query sees the keys of its own segment whose slot is not after its own. The
    slot of query t is `q_offset + t`; segment 0 is padding and sees only padding.
    Scores and softmax are float32 whatever the inputs' dtype.

    With `q_context_ids_BT` a query also sees the segment named there: a context that
    several continuations in the row share.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # Heads first, and a key-value head's queries in rows R = G x T: plain batched
    # matrix products, which no backend needs to transpose again.
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4) * H**-0.5
    q_BKRH = q_BKRH.reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    scores_BKRS = jnp.einsum(
        "BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32
    )
    slot_T1 = q_offset + jnp.arange(T, dtype=jnp.int32)[:, None]
    causal_TS = slot_T1 >= jnp.arange(S, dtype=jnp.int32)[None, :]
    same_BTS = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    if q_context_ids_BT is not None:
        same_BTS |= q_context_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    mask_BTS = jnp.logical_and(same_BTS, causal_TS[None])
    scores_BKGTS = scores_BKRS.reshape(B, K, G, T, S)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    probs_BKRS = probs_BKGTS.reshape(B, K, G * T, S)
    out_BKRH = jnp.einsum("BKRS,BKSH->BKRH", probs_BKRS, v_BKSH)
    out_BTKGH = out_BKRH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, N, H)
