"""Token weights, and weighted cross-entropy as sums that add up over anything.

`token_weights` is the only place where a token gets its weight in the objective, from
the two tables that data/token_weights.py makes for a stage.
Everything returned is a sum (of losses, targets, per language), so that
microbatches, devices and hosts add theirs and divide once: a mean of means would
weigh short batches more.

Shape suffixes: B batch, T length, D model, V vocabulary, G languages.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gamayun_jax.model import sharding
from gamayun_jax.model.weights import VOCAB_MATRIX_AXES

Batch = dict[str, jax.Array]


class TokenWeights(NamedTuple):
    """A stage's weights as two small tables; a token's weight is their product.

    See data/token_weights.py, where they are made.
    """

    language: np.ndarray  # float32 [G], by the language of the token
    token: np.ndarray  # float32 [V], by the target's id


def token_weights(batch: Batch, tables: TokenWeights) -> jax.Array:
    """Weight of each target token in the loss, float32 [B, T]; 0 where masked."""
    by_language_BT = jnp.take(jnp.asarray(tables.language), batch["language"])
    by_token_BT = jnp.take(jnp.asarray(tables.token), batch["targets"])
    return batch["loss_mask"] * by_language_BT * by_token_BT


def target_and_logsumexp(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The targets' logits [B, T], log-sum-exp [B, T] and all logits [B, T, V].

    The target's logit is picked by a masked sum, which stays local when the vocabulary
    is sharded and fuses with the other reductions; on CPUs, where it takes as long as
    the sum of exponentials, by a gather.
    """
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32
    )
    peak_BT1 = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    lse_BT = (
        jnp.log(jnp.sum(jnp.exp(logits_BTV - peak_BT1), axis=-1)) + peak_BT1[..., 0]
    )

    def masked_sum(logits: jax.Array, targets: jax.Array) -> jax.Array:
        ids_V = jnp.arange(w_VD.shape[0], dtype=targets.dtype)
        hit = targets[..., None] == ids_V[None, None]
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)

    def gather(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    target_BT = jax.lax.platform_dependent(
        logits_BTV, targets_BT, cpu=gather, default=masked_sum
    )
    return target_BT, lse_BT, logits_BTV


def _head_forward(x_BTD, w_VD, targets_BT, weights_BT, z_loss, dw_dtype):
    """Loss, nll_BT, and (dx_BTD, dw_DV): None where no `dw_dtype` asks for them."""
    target_BT, lse_BT, logits_BTV = target_and_logsumexp(x_BTD, w_VD, targets_BT)
    nll_BT = lse_BT - target_BT
    loss = jnp.sum(weights_BT * (nll_BT + z_loss * jnp.square(lse_BT)))
    if dw_dtype is None:
        return loss, nll_BT, None
    # d loss / d logits = weight * (softmax * (1 + 2 z lse) - onehot)
    ids_V = jnp.arange(w_VD.shape[0], dtype=targets_BT.dtype)
    hit_BTV = targets_BT[..., None] == ids_V[None, None]
    scale_BT1 = (weights_BT * (1.0 + 2.0 * z_loss * lse_BT))[..., None]
    d_BTV = jnp.exp(logits_BTV - lse_BT[..., None]) * scale_BT1
    d_BTV -= jnp.where(hit_BTV, weights_BT[..., None], 0.0)
    d_BTV = d_BTV.astype(x_BTD.dtype)
    dx_BTD = jnp.einsum("BTV,VD->BTD", d_BTV, w_VD)
    # x first: on CPU XLA transposes the first factor, and this one is the narrower.
    return loss, nll_BT, (dx_BTD, sharding.weight_gradient(x_BTD, d_BTV, dw_dtype))


def _head(x_BTD, w_VD, targets_BT, weights_BT, z_loss, chunk, dw_dtype):
    B, T, _ = x_BTD.shape
    cast_w_VD = sharding.gather(w_VD, VOCAB_MATRIX_AXES, x_BTD.dtype)
    if not chunk or chunk >= T:
        loss, nll_BT, grads = _head_forward(
            x_BTD, cast_w_VD, targets_BT, weights_BT, z_loss, dw_dtype
        )
        if grads is not None:
            dw_VD = sharding.constrain_parameter(grads[1].T, VOCAB_MATRIX_AXES)
            grads = (grads[0], dw_VD.astype(jnp.float32))
        return loss, nll_BT, grads

    # Rows in groups P x Q, one for each part of the batch's division over devices, so
    # that a device sums its own part of dw over the chunks. Were dw one sum, it would
    # be added up over all devices in every chunk. It is in the dtype in which devices
    # sum it afterwards; in float32 it is the largest array of all.
    P, Q = sharding.batch_groups(B)

    def cut(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [T / chunk, P, Q, B', chunk]
        a = a.reshape(P, Q, B // (P * Q), T // chunk, chunk, *a.shape[2:])
        return jnp.moveaxis(sharding.divide_groups(a), 3, 0)

    def forward(*part):
        # A chunk's own part in float32: only what adds up is rounded.
        part_dtype = None if dw_dtype is None else jnp.float32
        return _head_forward(part[0], cast_w_VD, *part[1:], z_loss, part_dtype)

    def step(carry, part):
        loss, dw = carry
        part_loss, nll, grads = jax.vmap(jax.vmap(forward))(*part)
        dx = None
        if grads is not None:
            dx = grads[0]
            dw = sharding.divide_groups((dw + grads[1]).astype(dw.dtype))
        return (loss + jnp.sum(part_loss), dw), (nll, dx)

    dw0 = None
    if dw_dtype is not None:
        dw0 = sharding.divide_groups(jnp.zeros((P, Q, *w_VD.shape[::-1]), dw_dtype))
    parts = (cut(x_BTD), cut(targets_BT), cut(weights_BT))
    (loss, dw_PQDV), (nll, dx) = jax.lax.scan(step, (jnp.zeros(()), dw0), parts)

    def paste(a: jax.Array) -> jax.Array:  # the inverse of cut
        return jnp.moveaxis(a, 0, 3).reshape(B, T, *a.shape[5:])

    if dw_PQDV is None:
        return loss, paste(nll), None
    dw_VD = sharding.sum_groups(dw_PQDV.mT, VOCAB_MATRIX_AXES)
    return loss, paste(nll), (paste(dx), dw_VD.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def head_loss(
    x_BTD, w_VD, targets_BT, weights_BT, z_loss: float, chunk: int, reduce_dtype: str
):
    """Sum of weight * (nll + z_loss * lse^2) over [B, T], and nll_BT for metrics.

    The output head and the loss in one, so that the [B, T, V] logits need not exist:
    with `chunk` > 0, only [B, chunk, V] of them do at a time, and the gradient is
    formed in the same pass instead of recomputing them. `nll_BT` carries no gradient.
    The gradient of w adds up over chunks and devices in `reduce_dtype`.
    z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    loss, nll_BT, _ = _head(x_BTD, w_VD, targets_BT, weights_BT, z_loss, chunk, None)
    return loss, nll_BT


def _head_fwd(x_BTD, w_VD, targets_BT, weights_BT, z_loss, chunk, reduce_dtype):
    loss, nll_BT, grads = _head(
        x_BTD, w_VD, targets_BT, weights_BT, z_loss, chunk, reduce_dtype
    )
    return (loss, nll_BT), grads


def _head_bwd(z_loss, chunk, reduce_dtype, grads, cotangents):
    dx_BTD, dw_VD = grads
    g = cotangents[0]
    return dx_BTD * g.astype(dx_BTD.dtype), dw_VD * g, None, None


head_loss.defvjp(_head_fwd, _head_bwd)


def language_sums(
    batch: Batch, nll_BT: jax.Array, weights_BT: jax.Array, num_languages: int
) -> dict[str, jax.Array]:
    """Sums per language, float32 [G]: nll (nats), targets (unmasked), tokens (all),
    weights (of the targets)."""
    ids_G = jnp.arange(num_languages, dtype=jnp.int32)
    of_language_BTG = batch["language"][..., None] == ids_G[None, None]

    def total(values_BT: jax.Array) -> jax.Array:
        # No matrix product: a TPU rounds the factors of one in float32 to bfloat16.
        return jnp.sum(jnp.where(of_language_BTG, values_BT[..., None], 0.0), (0, 1))

    return {
        "nll": total(nll_BT * batch["loss_mask"]),
        "targets": total(batch["loss_mask"]),
        "tokens": total(jnp.ones_like(batch["loss_mask"])),
        "weights": total(weights_BT),
    }


def weighted_loss(
    x_BTD: jax.Array,
    w_VD: jax.Array,
    batch: Batch,
    tables: TokenWeights,
    z_loss: float = 0.0,
    chunk: int = 0,
    reduce_dtype: str = "float32",
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss summed over the batch, and the sums that go with it.

    The objective is loss_sum / target_count. Weights have mean 1 under the mixture,
    so dividing by the number of targets that count is unbiased.

    Returns:
      loss_sum: float32 scalar, to be differentiated.
      sums: `loss_sum`, `target_count` and `squared_weights` scalars, `languages` from
        `language_sums`.
    """
    weights_BT = token_weights(batch, tables)
    loss_sum, nll_BT = head_loss(
        x_BTD, w_VD, batch["targets"], weights_BT, z_loss, chunk, reduce_dtype
    )
    sums = {
        "loss_sum": loss_sum,
        "target_count": jnp.sum(batch["loss_mask"]),
        "squared_weights": jnp.sum(jnp.square(weights_BT)),
        "languages": language_sums(batch, nll_BT, weights_BT, len(tables.language)),
    }
    return loss_sum, sums
