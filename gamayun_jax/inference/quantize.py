"""Weight-only quantisation: int8 per output channel, int4 in groups of 64.

Symmetric, round to nearest. A quantised matrix is {"codes": integers, "scale":
float32}, and the model gives it back its floats where it is used. The table of
weights says what is quantised: embeddings are int8 in both, norms and biases stay
float32.
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

GROUP = 64
RECORD = "quantised.json"  # of a quantised folder; `gamayun report` reads it
MATRICES = {w.name: w for w in WEIGHTS.values() if w.kind.fewest_bits}


def is_quantised(leaf: Any) -> bool:
    """Whether a dict is one quantised matrix."""
    return isinstance(leaf, dict) and set(leaf) == {"codes", "scale"}


def map_leaves(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """`function(name, leaf)` of each parameter of nested dicts.

    A quantised matrix is one leaf.
    """
    if isinstance(tree, dict) and not is_quantised(tree):
        return {k: map_leaves(function, v, k) for k, v in tree.items()}
    return function(name, tree)


def quantize_matrix(w: jax.Array, summed: tuple[int, ...], bits: int) -> Any:
    """{"codes", "scale"} of one matrix, stacked over layers or not.

    8 bits: int8 codes, one scale per output channel. 4 bits: two codes in a uint8
    along the first of the summed axes, a scale for each GROUP of them (the greatest
    divisor of GROUP that fits). The error is at most half a scale.
    """
    axis = w.ndim + summed[0]
    if bits == 8:
        highest = jnp.max(jnp.abs(w), axis=summed, keepdims=True)
        scale = jnp.maximum(highest, 1e-30) / 127
        return {"codes": jnp.round(w / scale).astype(jnp.int8), "scale": scale}
    size = w.shape[axis]
    group = math.gcd(size, GROUP)
    if group < 4:
        raise UserError(f"int4 needs groups of 4 or more, an axis has {size}: use int8")
    parts = w.reshape(*w.shape[:axis], size // group, group, *w.shape[axis + 1 :])
    highest = jnp.max(jnp.abs(parts), axis=axis + 1, keepdims=True)
    scale = jnp.maximum(highest, 1e-30) / 7
    codes = (jnp.round(parts / scale) + 8).astype(jnp.uint8).reshape(w.shape)
    low, high = (
        jax.lax.slice_in_dim(codes, i, size, stride=2, axis=axis) for i in (0, 1)
    )
    return {"codes": low | (high << 4), "scale": jnp.squeeze(scale, axis + 1)}


def dequantize(leaf: Any, dtype: Any = jnp.float32) -> jax.Array:
    """The matrix in `dtype`; what is not quantised is returned as it is."""
    if not is_quantised(leaf):
        return leaf
    codes, scale = leaf["codes"], leaf["scale"].astype(dtype)
    if codes.dtype == jnp.int8:
        return codes.astype(dtype) * scale
    pairs = zip(codes.shape, scale.shape, strict=True)
    axis = next(i for i, (a, b) in enumerate(pairs) if a != b)
    both = jnp.stack([codes & 15, codes >> 4], axis=axis + 1)
    head, rest = codes.shape[:axis], codes.shape[axis + 1 :]
    groups = scale.shape[axis]
    values = both.reshape(*head, groups, -1, *rest).astype(dtype) - 8
    values *= jnp.expand_dims(scale, axis + 1)
    return values.reshape(*head, 2 * codes.shape[axis], *rest)


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


def abstract_quantised(abstract: Any, bits: int) -> Any:
    """Abstract quantised parameters; codes lie on the devices as their matrix did."""
    shapes = jax.eval_shape(lambda p: quantize(p, bits), abstract)

    def place(old: Any, new: Any) -> Any:
        if not is_quantised(new):
            return old
        codes = whole = sharding.replicated(old.sharding.mesh)
        with contextlib.suppress(ValueError):  # two int4 codes a byte: half an axis
            old.sharding.shard_shape(new["codes"].shape)
            codes = old.sharding
        layouts = {"codes": codes, "scale": whole}
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layouts[name])
            for name, x in new.items()
        }

    return jax.tree.map(
        place, abstract, shapes, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )


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
