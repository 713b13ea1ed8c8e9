"""Weight-only quantisation: int8 per output channel, int4 in groups of 32.

int8 is symmetric: {"codes": int8, "scale": float32}. int4 goes from the least to the
greatest of a group: {"codes": uint8, two in each, "scale": bfloat16, "zero": uint8}, a
weight being (code - zero) * scale: 4.75 bits. Here codes are the nearest; rounding.py
chooses better ones. The model gives a matrix back its floats where it is used. The
table of weights says what is quantised: embeddings are int8 in both, norms and biases
stay float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gamayun_jax.config import UserError
from gamayun_jax.data import files
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import WEIGHTS
from gamayun_jax.training.run_meta import RunMeta

GROUP = 32
FORMER_GROUP = 64  # of folders whose meta names none: symmetric, so without "zero"
RECORD = "quantised.json"  # of a quantised folder; `gamayun report` reads it
MATRICES = {w.name: w for w in WEIGHTS.values() if w.kind.fewest_bits}


def is_quantised(leaf: Any) -> bool:
    """Whether a dict is one quantised matrix."""
    return isinstance(leaf, dict) and {"codes", "scale"} <= set(leaf)


def map_leaves(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """`function(name, leaf)` of each parameter of nested dicts.

    A quantised matrix is one leaf.
    """
    if isinstance(tree, dict) and not is_quantised(tree):
        return {k: map_leaves(function, v, k) for k, v in tree.items()}
    return function(name, tree)


def group_of(size: int) -> int:
    """How many weights along an axis share a scale: the greatest divisor of GROUP.

    Raises:
      UserError: it is under 4.
    """
    group = math.gcd(size, GROUP)
    if group < 4:
        raise UserError(f"int4 needs groups of 4 or more, an axis has {size}: use int8")
    return group


def grid(parts: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Scale (bfloat16) and zero point (uint8) of groups along an axis, left as 1.

    16 codes from the least to the greatest weight, 0 among them. bfloat16 has the range
    of float32; codes are chosen for the scale as it is stored.
    """
    high = jnp.maximum(jnp.max(parts, axis=axis, keepdims=True), 0)
    low = jnp.minimum(jnp.min(parts, axis=axis, keepdims=True), 0)
    scale = (jnp.maximum(high - low, 1e-30) / 15).astype(jnp.bfloat16)
    return scale, jnp.round(-low / scale.astype(jnp.float32)).astype(jnp.uint8)


def encode(w: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """The nearest codes, uint8 from 0 to 15."""
    steps = jnp.round(w / scale.astype(jnp.float32)) + zero.astype(jnp.float32)
    return jnp.clip(steps, 0, 15).astype(jnp.uint8)


def decode(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """The weights of codes."""
    return (codes.astype(dtype) - zero.astype(dtype)) * scale.astype(dtype)


def pack(codes: jax.Array, axis: int) -> jax.Array:
    """Two 4-bit codes in a uint8, neighbours along an axis."""
    size = codes.shape[axis]
    low, high = (
        jax.lax.slice_in_dim(codes, i, size, stride=2, axis=axis) for i in (0, 1)
    )
    return low | (high << 4)


def quantize_matrix(w: jax.Array, summed: tuple[int, ...], bits: int) -> Any:
    """One matrix, stacked over layers or not, its weights rounded to the nearest code.

    8 bits: one scale per output channel. 4 bits: two codes in a uint8 along the first
    of the summed axes, a scale and a zero point for each group of them (`group_of`).
    The error is at most half a scale, but for the rounding of the scale itself.
    """
    axis = w.ndim + summed[0]
    if bits == 8:
        highest = jnp.max(jnp.abs(w), axis=summed, keepdims=True)
        scale = jnp.maximum(highest, 1e-30) / 127
        return {"codes": jnp.round(w / scale).astype(jnp.int8), "scale": scale}
    parts = _in_groups(w, axis, w.shape[axis] // group_of(w.shape[axis]))
    scale, zero = grid(parts, axis + 1)
    codes = encode(parts, scale, zero).reshape(w.shape)
    scale, zero = (jnp.squeeze(x, axis + 1) for x in (scale, zero))
    return {"codes": pack(codes, axis), "scale": scale, "zero": zero}


def _in_groups(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """An axis as two, the first of `groups`."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def dequantize(leaf: Any, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix in `dtype`; what is not quantised is returned as it is."""
    if not is_quantised(leaf):
        return leaf
    codes, scale = leaf["codes"], leaf["scale"]
    if codes.dtype == jnp.int8:
        return codes.astype(dtype) * scale.astype(dtype)
    zero = leaf.get("zero", jnp.full_like(scale, 8))
    pairs = zip(codes.shape, scale.shape, strict=True)
    axis = next(i for i, (a, b) in enumerate(pairs) if a != b)
    both = jnp.stack([codes & 15, codes >> 4], axis=axis + 1)
    shape = (*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
    parts = _in_groups(both.reshape(shape), axis, scale.shape[axis])
    scale, zero = (jnp.expand_dims(x, axis + 1) for x in (scale, zero))
    return decode(parts, scale, zero, dtype).reshape(shape)


def quantize(params: Any, bits: int) -> Any:
    """The parameters with every matrix quantised to 8 or 4 bits.

    Raises:
      UserError: other bits, or parameters that are quantised already.
    """
    if bits not in (4, 8):
        raise UserError(f"{bits} bits: choose 8 or 4")

    def one(name: str, leaf: Any) -> Any:
        if is_quantised(leaf):
            raise UserError("the checkpoint is quantised already: give the original")
        if name not in MATRICES:
            return leaf
        weight = MATRICES[name]
        least = weight.kind.fewest_bits or 8
        return quantize_matrix(leaf, weight.summed_axes, max(bits, least))

    return map_leaves(one, params)


def dequantize_all(params: Any) -> Any:
    """float32 parameters as the model was trained with, but for the rounding."""
    return map_leaves(lambda _, leaf: dequantize(leaf), params)


def abstract_quantised(abstract: Any, bits: int, group: int | None) -> Any:
    """Abstract quantised parameters; codes lie on the devices as their matrix did.

    Args:
      group: of int4, as the checkpoint's meta has it; None: a folder of before.
    """
    shapes = jax.eval_shape(lambda p: quantize(p, bits), abstract)
    if bits == 4 and group is None:
        shapes = map_leaves(_former, shapes)

    def place(old: Any, new: Any) -> Any:
        if not is_quantised(new):
            return old
        codes = whole = sharding.replicated(old.sharding.mesh)
        with contextlib.suppress(ValueError):  # two int4 codes a byte: half an axis
            old.sharding.shard_shape(new["codes"].shape)
            codes = old.sharding
        return {
            name: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=codes if name == "codes" else whole
            )
            for name, x in new.items()
        }

    return jax.tree.map(
        place, abstract, shapes, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )


def _former(_: str, leaf: Any) -> Any:
    """Shapes of a matrix as former versions wrote it."""
    if not is_quantised(leaf) or "zero" not in leaf:
        return leaf
    codes, scale = leaf["codes"], leaf["scale"]
    pairs = zip(codes.shape, scale.shape, strict=True)
    axis = next(i for i, (a, b) in enumerate(pairs) if a != b)
    size = 2 * codes.shape[axis]
    groups = size // math.gcd(size, FORMER_GROUP)
    shape = (*scale.shape[:axis], groups, *scale.shape[axis + 1 :])
    return {"codes": codes, "scale": jax.ShapeDtypeStruct(shape, jnp.float32)}


def write_record(out: Path, meta: RunMeta, bits: int, sizes: Any, evals: Any) -> None:
    """Write what was lost and won: RECORD in the quantised folder.

    Args:
      meta: of the checkpoint that was quantised.
      sizes: bytes of the weights before and after.
      evals: evaluations of the floats and of the quantised weights, or none.
    """
    record = dict(
        format=1,
        run=meta.lineage.get("run"),
        step=meta.step,
        tokens=meta.tokens,
        bits=bits,
        bytes=dict(zip(("before", "after"), sizes, strict=True)),
        evals=list(evals),
    )
    files.write_json(out / RECORD, record)


def size_bytes(params: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
