"""Weight-only quantisation: int8 per output channel, or int4 in groups.

int8 is symmetric: {"codes": int8, "scale": float32}. An int4 model's matrices have 4
to 6 bits, as the table of weights says; 16 to 64 codes go from the least to the
greatest of a group: {"codes": uint8, the low 4 bits of two in each, "high": uint8, the
other bits, "scale": uint8, "zero": uint8, two in each}, a weight being
(code - zero) * scale. Here codes are the nearest; rounding.py chooses better ones. The
model gives a matrix back its floats where it is used. Norms and biases stay float32.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gamayun_jax.config import UserError
from gamayun_jax.data import files
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import WEIGHTS
from gamayun_jax.training.run_meta import RunMeta

GROUPS = {4: 32, 5: 32, 6: 64}  # by bits: weights that share a scale
LAYOUT = 2  # of int4, in a checkpoint's meta; without one: see `_former`
# A scale's code, a byte, counts steps of 6 % from 2**-18 on, which end at 2**3.25.
OCTAVE, LEAST = 12, -18
SHRUNK = (1.0, 0.96, 0.92, 0.87, 0.82)  # of a group's range: grids that are tried
RECORD = "quantised.json"  # of a quantised folder; `gamayun report` reads it
MATRICES = {w.name: w for w in WEIGHTS.values() if w.kind.fewest_bits}


def bits_of(name: str) -> int:
    """Of a matrix in an int4 model."""
    return MATRICES[name].kind.fewest_bits or 8


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


def group_of(size: int, bits: int) -> int:
    """How many weights along an axis share a scale: the greatest divisor of GROUPS.

    Raises:
      UserError: it is under 8.
    """
    group = math.gcd(size, GROUPS[bits])
    if group < 8:
        raise UserError(f"int4 needs groups of 8 or more, an axis has {size}: use int8")
    return group


def scale_of(codes: jax.Array) -> jax.Array:
    """float32 scales of their codes."""
    return jnp.exp2(codes.astype(jnp.float32) / OCTAVE + LEAST)


def grid(
    parts: jax.Array, axis: int, bits: int, importance: Any = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Scale (float32, one that has a code) and zero point (uint8) of groups along an
    axis, left as 1: those of the least squared error of the nearest codes.

    Args:
      importance: a factor on the squared errors of weights.
    """

    def tried(shrunk: float) -> Sequence[jax.Array]:
        scale, zero = _whole_grid(parts * shrunk, axis, bits)
        off = decode(encode(parts, scale, zero, bits), scale, zero) - parts
        error = jnp.sum(importance * jnp.square(off), axis=axis, keepdims=True)
        return error, scale, zero

    def better(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return [jnp.where(b[0] < a[0], y, x) for x, y in zip(a, b, strict=True)]

    _, scale, zero = functools.reduce(better, map(tried, SHRUNK))
    return scale, zero


def _whole_grid(parts: jax.Array, axis: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """From the least to the greatest weight of a group, 0 among them.

    A zero point is one of 16, so that of more than 16 codes a few are kept for what it
    misses by.
    """
    coarse = 2 ** (bits - 4)
    high = jnp.maximum(jnp.max(parts, axis=axis, keepdims=True), 0)
    low = jnp.minimum(jnp.min(parts, axis=axis, keepdims=True), 0)
    scale = jnp.maximum(high - low, 1e-30) / (2**bits - coarse)
    # Rounded up, unless that costs the ends less than a quarter of a step.
    steps = jnp.ceil((jnp.log2(scale) - LEAST) * OCTAVE - 0.25 / coarse)
    scale = scale_of(jnp.clip(steps, 0, 255))
    zero = (-low / scale + (coarse - 1) / 2) / coarse
    return scale, (jnp.clip(jnp.round(zero), 0, 15) * coarse).astype(jnp.uint8)


def encode(w: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    """The nearest codes, uint8."""
    steps = jnp.round(w / scale) + zero.astype(jnp.float32)
    return jnp.clip(steps, 0, 2**bits - 1).astype(jnp.uint8)


def decode(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """The weights of codes."""
    return (codes.astype(dtype) - zero.astype(dtype)) * scale.astype(dtype)


def _pack(values: jax.Array, axis: int, width: int) -> jax.Array:
    """Neighbours along an axis in a uint8, each in `width` bits; 0 where one lacks."""
    many = 8 // width
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, -values.shape[axis] % many)
    values = jnp.pad(values, padding)
    size = values.shape[axis]
    parts = [
        jax.lax.slice_in_dim(values, i, size, stride=many, axis=axis) << (i * width)
        for i in range(many)
    ]
    return functools.reduce(jnp.bitwise_or, parts)


def _unpack(packed: jax.Array, axis: int, width: int, size: int) -> jax.Array:
    """The first `size` that `_pack` put there."""
    places = jnp.arange(0, 8, width, dtype=jnp.uint8)
    others = [i for i in range(packed.ndim + 1) if i != axis + 1]
    places = jnp.expand_dims(places, others)
    parts = (jnp.expand_dims(packed, axis + 1) >> places) & (2**width - 1)
    shape = (*packed.shape[:axis], -1, *packed.shape[axis + 1 :])
    return jax.lax.slice_in_dim(parts.reshape(shape), 0, size, axis=axis)


def packed(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, axis: int, bits: int
) -> dict[str, jax.Array]:
    """The leaf of a matrix in groups along an axis; scale and zero are of `grid`."""
    steps = jnp.round((jnp.log2(scale) - LEAST) * OCTAVE).astype(jnp.uint8)
    leaf = {"codes": _pack(codes & 15, axis, 4), "scale": steps}
    if bits > 4:
        leaf["high"] = _pack(codes >> 4, axis, bits - 4)
    return {**leaf, "zero": _pack(zero >> (bits - 4), axis, 4)}


def quantize_matrix(w: jax.Array, summed: tuple[int, ...], bits: int) -> Any:
    """One matrix, stacked over layers or not, its weights rounded to the nearest code.

    8 bits: one scale per output channel. Fewer: a scale and a zero point for each group
    (`group_of`) along the first of the summed axes. The error is at most half a scale,
    but beyond the ends of a grid (`grid`).
    """
    axis = w.ndim + summed[0]
    if bits == 8:
        highest = jnp.max(jnp.abs(w), axis=summed, keepdims=True)
        scale = jnp.maximum(highest, 1e-30) / 127
        return {"codes": jnp.round(w / scale).astype(jnp.int8), "scale": scale}
    parts = _in_groups(w, axis, w.shape[axis] // group_of(w.shape[axis], bits))
    scale, zero = grid(parts, axis + 1, bits)
    codes = encode(parts, scale, zero, bits).reshape(w.shape)
    scale, zero = (jnp.squeeze(x, axis + 1) for x in (scale, zero))
    return packed(codes, scale, zero, axis, bits)


def _in_groups(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """An axis as two, the first of `groups`."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def _axis_of(leaf: Any) -> int:
    """Along which its groups lie."""
    pairs = zip(leaf["codes"].shape, leaf["scale"].shape, strict=True)
    return next(i for i, (a, b) in enumerate(pairs) if a != b)


def unfold(leaf: Any) -> Any:
    """A quantised matrix with floats for the codes of scales and a byte for each zero
    point, so that not every use has to make them; what has no such codes as it is."""
    if not is_quantised(leaf) or leaf["scale"].dtype != jnp.uint8:
        return leaf
    axis = _axis_of(leaf)
    zero = _unpack(leaf["zero"], axis, 4, leaf["scale"].shape[axis])
    if "high" in leaf:
        zero <<= 4 * leaf["high"].shape[axis] // leaf["codes"].shape[axis]
    return {**leaf, "scale": scale_of(leaf["scale"]), "zero": zero}


def dequantize(leaf: Any, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix in `dtype`; what is not quantised is returned as it is."""
    if not is_quantised(leaf):
        return leaf
    leaf = unfold(leaf)
    codes, scale = leaf["codes"], leaf["scale"]
    if codes.dtype == jnp.int8:
        return codes.astype(dtype) * scale.astype(dtype)
    axis = _axis_of(leaf)
    size = 2 * codes.shape[axis]
    codes = _unpack(codes, axis, 4, size)
    if "high" in leaf:
        width = 8 * leaf["high"].shape[axis] // size
        codes |= _unpack(leaf["high"], axis, width, size) << 4
    parts = _in_groups(codes, axis, scale.shape[axis])
    zero = leaf.get("zero", jnp.full_like(scale, 8))
    scale, zero = (jnp.expand_dims(x, axis + 1) for x in (scale, zero))
    return decode(parts, scale, zero, dtype).reshape(codes.shape)


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
        fewest = bits_of(name) if bits == 4 else bits
        return quantize_matrix(leaf, MATRICES[name].summed_axes, fewest)

    return map_leaves(one, params)


def dequantize_all(params: Any) -> Any:
    """float32 parameters as the model was trained with, but for the rounding."""
    return map_leaves(lambda _, leaf: dequantize(leaf), params)


def abstract_quantised(abstract: Any, meta: RunMeta) -> Any:
    """Abstract parameters of a quantised checkpoint with this meta.

    Codes lie on the devices as their matrix did.
    """
    former = meta.bits == 4 and meta.layout is None
    bits = 8 if former else meta.bits or 8
    shapes = jax.eval_shape(lambda p: quantize(p, bits), abstract)
    if former:
        layers = map_leaves(functools.partial(_former, meta.group), abstract["layers"])
        shapes = {**shapes, "layers": layers}

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


def _former(group: int | None, name: str, leaf: Any) -> Any:
    """Shapes of a matrix before there were layouts, all of 4 bits: symmetric, or, where
    the meta names a group, with zero points. Groups were of 4 or more then."""
    if name not in MATRICES:
        return leaf
    axis = len(leaf.shape) + MATRICES[name].summed_axes[0]
    size = leaf.shape[axis]

    def along(many: int) -> tuple[int, ...]:
        return (*leaf.shape[:axis], many, *leaf.shape[axis + 1 :])

    scale = along(size // math.gcd(size, group or 64))
    shapes = {"codes": jax.ShapeDtypeStruct(along(size // 2), jnp.uint8)}
    if group is None:
        return {**shapes, "scale": jax.ShapeDtypeStruct(scale, jnp.float32)}
    return {
        **shapes,
        "scale": jax.ShapeDtypeStruct(scale, jnp.bfloat16),
        "zero": jax.ShapeDtypeStruct(scale, jnp.uint8),
    }


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
