"""Causal attention within segments: one definition, and the fast ways to compute it.

`attention` is the definition, for any queries and keys (decoding with a cache too).
`self_attention` computes the same for whole sequences by what is fastest where it
runs: the splash kernel on TPU, cuDNN's on GPU, and elsewhere `by_parts`: `attention`
itself, by parts of the queries where the sequence is long. The kernels run inside a
shard_map over the mesh in use: no compiler divides what is inside them.

Shape suffixes: B batch, T query length, S key length, N query heads, K key-value
heads, G = N / K query heads per key-value head, H head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from gamayun_jax.config import UserError
from gamayun_jax.model import ops

# Names of what a remat policy may keep: attention's output, and the kernel's log-sum-
# exps, without which its backward pass would need a second forward pass.
OUTPUT = "attention_output"
# Queries per part of the plain path, whose scores exist one part at a time; and the
# least where they are a quarter of all, in scoring: no backward pass makes them again,
# and layers are one loop, so that many parts do not take long to compile.
PART, LEAST_PART = 512, 64
# Rows and columns of the splash kernel's tiles, where the sequence has as many.
SPLASH_BLOCK = 1024
LANES = 128  # of a TPU's vector registers: tiles are multiples of it


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
    mask_B1RS = jnp.tile(mask_BTS, (1, G, 1))[:, None]
    probs_BKRS = ops.masked_softmax(scores_BKRS, mask_B1RS).astype(v_BSKH.dtype)
    out_BKRH = jnp.einsum("BKRS,BKSH->BKRH", probs_BKRS, v_BKSH)
    out_BTKGH = out_BKRH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    return out_BTKGH.reshape(B, T, N, H)


def self_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    attention_impl: str = "auto",
) -> jax.Array:
    """`attention` of whole sequences to themselves.

    Args:
      attention_impl: ComputeConfig.attention. "auto" takes splash on TPU and cudnn on
        GPU where they can compute these shapes, and xla otherwise.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`.

    Raises:
      UserError: `attention_impl` is a kernel that cannot compute these shapes.
    """
    backend = {"tpu": "splash", "gpu": "cudnn"}.get(jax.default_backend(), "xla")
    chosen = backend if attention_impl == "auto" else attention_impl
    why_not = {"splash": _not_splash, "cudnn": _not_cudnn}.get(chosen)
    problem = why_not(q_BTNH) if why_not else ""
    if problem and attention_impl != "auto":
        raise UserError(
            f"compute.attention={attention_impl!r}: {problem}; use 'auto' or 'xla'"
        )
    if chosen == "xla" or problem:
        out_BTNH = by_parts(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        return checkpoint_name(out_BTNH, OUTPUT)
    if chosen == "splash":  # names its output, and what else it keeps, itself
        return _over_mesh(_splash)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    out_BTNH = _over_mesh(_cudnn)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return checkpoint_name(out_BTNH, OUTPUT)


def _over_mesh(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The kernel on each device's rows and heads; all of them without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel

    def spec(*axes: str | None) -> PartitionSpec:
        return nn.logical_to_mesh_axes(axes) or PartitionSpec()

    heads = spec("batch", "length", "act_heads", None)
    rows = spec("batch", "length")
    # Nothing is summed over devices inside, so there is nothing for check_vma to
    # check, and Pallas calls do not say how their results vary.
    return jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )


# --- by parts of the queries ------------------------------------------------------


def by_parts(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    context_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """`attention` of whole sequences on parts of the queries, each with the keys up to
    its end.

    Scores take [B, N, size, T] instead of [B, N, T, T], nearly half of the products
    are never made, and the backward pass computes a part's scores again.
    """
    T = q_BTNH.shape[1]
    size = PART if context_ids_BT is None else min(max(T // 4, LEAST_PART), PART)
    starts = range(0, T, size)
    if len(starts) <= 2:
        segments = (segment_ids_BT, segment_ids_BT)
        return attention(q_BTNH, k_BTKH, v_BTKH, *segments, 0, context_ids_BT)

    @functools.partial(jax.checkpoint, static_argnums=0)
    def part(start, q, k, v, segments, contexts):
        return attention(q, k, v, segments[:, start:], segments, start, contexts)

    parts = []
    for start in starts:
        end = min(start + size, T)
        contexts = None if context_ids_BT is None else context_ids_BT[:, start:end]
        keys = (k_BTKH[:, :end], v_BTKH[:, :end], segment_ids_BT[:, :end])
        parts.append(part(start, q_BTNH[:, start:end], *keys, contexts))
    return jnp.concatenate(parts, axis=1)


# --- splash: TPU ------------------------------------------------------------------


def _not_splash(q_BTNH: jax.Array) -> str:
    """Why the splash kernel cannot take these queries; empty if it can."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if T % LANES:
        return f"splash needs a length that is a multiple of {LANES}, not {T}"
    if H % 64:
        return f"splash needs heads whose width is a multiple of 64, not {H}"
    return ""


def _splash(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, interpret: bool = False
) -> jax.Array:
    """Block-sparse flash attention (jax.experimental.pallas, splash_attention).

    Blocks above the diagonal are skipped; forward and backward are kernels.
    """
    _, T, N, H = q_BTNH.shape
    block = next(b for b in (SPLASH_BLOCK, 512, 384, 256, LANES) if T % b == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        # dq beside dk and dv in one kernel: the scores are made once, not twice.
        use_fused_bwd_kernel=True,
    )
    causal = splash_attention_mask.CausalMask((T, T))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUTPUT,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    out_BNTH = jax.vmap(kernel)(
        jnp.swapaxes(q_BTNH * H**-0.5, 1, 2),
        jnp.swapaxes(k_BTKH, 1, 2),
        jnp.swapaxes(v_BTKH, 1, 2),
        segments,
    )
    return jnp.swapaxes(out_BNTH, 1, 2)


# --- cuDNN: GPU -------------------------------------------------------------------


def _not_cudnn(q_BTNH: jax.Array) -> str:
    """Why cuDNN's kernel cannot take these queries; empty if it can."""
    H = q_BTNH.shape[3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn needs compute.dtype='bfloat16', not {q_BTNH.dtype}"
    if H % 8 or H > 128:
        return f"cudnn needs heads whose width is a multiple of 8 up to 128, not {H}"
    return ""


def _cudnn(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, implementation: Any = "cudnn"
) -> jax.Array:
    """cuDNN's fused flash attention; segments are a mask over [B, 1, T, T]."""
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same_BTT[:, None],
        is_causal=True,
        implementation=implementation,
    )
