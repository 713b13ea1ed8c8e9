"""The model's operations with gradients of their own, for speed and memory.

Each is a formula that reads as one line in the model; what its backward pass keeps,
computes again and sums is decided here.

Shape suffixes: B batch, T length, D model, F mlp, V vocabulary; I inputs and O outputs
of a matrix, one or two axes each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gamayun_jax.model import sharding

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@flax.struct.dataclass
class Matrix:
    """A matrix parameter, which may be divided over devices."""

    value: jax.Array  # float32 [*I, *O]; of the vocabulary [V, D]
    axes: tuple[str | None, ...] = flax.struct.field(pytree_node=False)  # logical
    summed: int = flax.struct.field(pytree_node=False)  # number of the axes I
    # In which devices sum the gradient (ComputeConfig.reduce_dtype).
    reduce_dtype: str = flax.struct.field(pytree_node=False)

    def gathered(self, dtype: Any) -> jax.Array:
        """The whole matrix, but for `tensor`, in a dtype."""
        return sharding.gather(self.value, self.axes, dtype)


def as_rank_of(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector for x's last axes with the rank of x: JAX is told not to promote."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


# --- matrix products ------------------------------------------------------------------


def product(x: jax.Array, w: jax.Array, axes: Any) -> jax.Array:
    """`jnp.tensordot` in the dtype of x, summed in float32 and rounded once.

    XLA for CPUs takes the processor's instructions for bfloat16 only where the result
    is float32: 436 instead of 210 GFLOP/s of a core of an AMD EPYC with AVX512_BF16.
    """

    def by_float32(x: jax.Array, w: jax.Array) -> jax.Array:
        y32 = jnp.tensordot(x, w, axes, preferred_element_type=jnp.float32)
        return y32.astype(x.dtype)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tensordot(x, w, axes)

    if x.dtype == jnp.float32:
        return plain(x, w)
    return jax.lax.platform_dependent(x, w, cpu=by_float32, default=plain)


@jax.custom_vjp
def linear(x: jax.Array, w: Matrix) -> jax.Array:
    """x [B, T, *I] times w [*I, *O], in the dtype of x: [B, T, *O].

    Why it has its own gradient:

    - The gathered weight is no residual under any remat policy: saving it would undo
      FSDP.
    - The gradient of w leaves the product in the dtype in which devices sum it.
      Automatic differentiation would round each device's part to the dtype of x.
    - The narrower factor of that product comes first. Automatic differentiation puts
      the output's gradient first, and on CPU XLA transposes the first factor, with all
      that computes it: for SwiGLU that took a quarter of a step.
    """
    return product(x, w.gathered(x.dtype), w.summed)


def _linear_fwd(x, w):
    return linear(x, w), (x, w)


def _linear_bwd(saved, g):
    x, w = saved
    outputs = tuple(range(w.summed, w.value.ndim))  # axes of w, behind B and T of g
    dx = product(g, w.gathered(x.dtype), (tuple(range(2, g.ndim)), outputs))
    if x.size <= g.size:
        dw = sharding.weight_gradient(x, g, w.reduce_dtype)
    else:
        dw = sharding.weight_gradient(g, x, w.reduce_dtype)
        dw = jnp.moveaxis(dw, range(len(outputs)), outputs)
    dw = sharding.constrain_parameter(dw, w.axes).astype(w.value.dtype)
    return dx, w.replace(value=dw)


linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(w_VD: Matrix, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the embedding, which is gathered over fsdp like any other weight.

    Left to itself, the partitioner looks up the whole global batch on every device,
    and sums the whole table's gradient over all of them.
    """
    return jnp.take(w_VD.gathered(dtype), tokens_BT, axis=0)


def _embed_fwd(w_VD, tokens_BT, dtype):
    return embed(w_VD, tokens_BT, dtype), (w_VD, tokens_BT)


def _embed_bwd(dtype, saved, dx_BTD):
    w_VD, tokens_BT = saved
    P, Q = sharding.batch_groups(len(tokens_BT))

    def cut(a: jax.Array) -> jax.Array:  # each device's rows: [P, Q, B' x T, ...]
        a = a.reshape(P, Q, -1, *a.shape[2:])
        return sharding.divide_groups(a)

    # In float32: a sum in bfloat16 stands still once it is 256 times what is added,
    # and the token of a comma is added thousands of times.
    def add(dx, tokens):
        zeros = jnp.zeros(w_VD.value.shape, jnp.float32)
        return zeros.at[tokens].add(dx.astype(jnp.float32)).astype(w_VD.reduce_dtype)

    parts = sharding.divide_groups(jax.vmap(jax.vmap(add))(cut(dx_BTD), cut(tokens_BT)))
    dw_VD = sharding.sum_groups(parts, w_VD.axes).astype(w_VD.value.dtype)
    return w_VD.replace(value=dw_VD), None


embed.defvjp(_embed_fwd, _embed_bwd)


# --- elementwise ----------------------------------------------------------------------


def _recomputed(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with a gradient that keeps its arguments and computes all else again.

    That takes less memory, and on CPU less time. A remat policy around it sees through
    it, other than through `jax.checkpoint`. And only on CPU a barrier keeps XLA from
    merging the second computation with the first, which would keep what that made:
    XLA for TPUs estimates that barriers cost 14 % of a step.
    """

    def barrier(values: Any) -> Any:
        on_cpu = jax.lax.optimization_barrier
        return jax.lax.platform_dependent(values, cpu=on_cpu, default=lambda x: x)

    def backward(saved: Any, g: Any) -> Any:
        saved, g = barrier((saved, g))
        return jax.vjp(op, *saved)[1](g)

    wrapped = jax.custom_vjp(op)
    wrapped.defvjp(lambda *args: (op(*args), args), backward)
    return wrapped


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32 (arXiv 1910.07467)."""

    @_recomputed
    def norm(x, scale):
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
        return (x32 * inverse * as_rank_of(scale, x32)).astype(x.dtype)

    return norm(x, scale)


@_recomputed
def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array, down_FD: Matrix) -> jax.Array:
    """down(silu(gate) * up): [B, T, D] (Shazeer, arXiv 2002.05202)."""
    h_BTF = nn.with_logical_constraint(
        jax.nn.silu(gate_BTF) * up_BTF, ("batch", "length", "act_mlp")
    )
    return linear(h_BTF, down_FD)


@jax.custom_vjp
def masked_softmax(scores_BKRS: jax.Array, mask_B1RS: jax.Array) -> jax.Array:
    """Softmax over the last axis where the mask is true.

    Its gradient keeps the result, which the next product keeps anyway, and no other
    array of that size.
    """
    return jax.nn.softmax(jnp.where(mask_B1RS, scores_BKRS, MASKED), axis=-1)


def _masked_softmax_fwd(scores_BKRS, mask_B1RS):
    probs_BKRS = masked_softmax(scores_BKRS, mask_B1RS)
    return probs_BKRS, (probs_BKRS, mask_B1RS)


def _masked_softmax_bwd(saved, g_BKRS):
    probs_BKRS, mask_B1RS = saved
    mean_BKR1 = jnp.sum(probs_BKRS * g_BKRS, axis=-1, keepdims=True)
    return jnp.where(mask_B1RS, probs_BKRS * (g_BKRS - mean_BKR1), 0.0), None


masked_softmax.defvjp(_masked_softmax_fwd, _masked_softmax_bwd)
