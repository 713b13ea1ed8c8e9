"""Whether what is read of a checkpoint is what was written: checksums and shapes.

An array's checksum is taken on the devices from the values themselves: one pass over
memory, no pass over files, and the same on any mesh.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gamayun_jax.config import UserError
from gamayun_jax.model.weights import parameter_path


def json_sha256(data: Any) -> str:
    """Hash of plain JSON data, whatever the order of its keys."""
    text = json.dumps(json.loads(json.dumps(data)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(parameter_path(path), leaf) for path, leaf in leaves]


def checksum(x: jax.Array, by_row: bool = False) -> jax.Array:
    """uint32 of an array's values and their places: the sum of each element's bits
    times an odd number of its place, modulo 2**32.

    Integers add up the same in any order, so on any mesh. Any change of one element
    changes the sum, since an odd number has an inverse; more escape once in 2**32.

    Args:
      by_row: go through the first axis in a loop, which must not be divided over
        devices. XLA's CPU backend otherwise writes all the products to memory first.
    """
    if x.dtype.itemsize not in (1, 2, 4) or not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.int32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]

    def of(values: jax.Array, first: Any) -> jax.Array:
        """That of `values`, the first of which has the place `first`."""
        bits = jax.lax.bitcast_convert_type(values, unsigned).astype(jnp.uint32)
        odd = jnp.full(values.shape, 2 * jnp.uint32(first) + 1, jnp.uint32)
        stride = 2
        for axis in reversed(range(values.ndim)):
            iota = jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
            odd += iota * jnp.uint32(stride % 2**32)
            stride *= values.shape[axis]
        return jnp.sum(bits * odd, dtype=jnp.uint32)

    if not by_row or x.ndim < 2:
        return of(x, 0)
    size = jnp.uint32(math.prod(x.shape[1:]) % 2**32)

    def add(row: jax.Array, total: jax.Array) -> jax.Array:
        values = jax.lax.dynamic_index_in_dim(x, row, keepdims=False)
        return total + of(values, row.astype(jnp.uint32) * size)

    return jax.lax.fori_loop(0, x.shape[0], add, jnp.uint32(0))


def checksums(items: dict[str, Any]) -> dict[str, dict[str, str]]:
    """item -> path -> checksum of each array, in hexadecimal."""

    def of(x: Any) -> Any:
        x = jnp.asarray(x)
        return jax.device_get(_checksum(x, len(x.sharding.device_set) == 1))

    # One array at a time: together they would take the memory of all of them again.
    values = jax.tree.map(of, items)
    return {
        item: {name: f"{int(v):08x}" for name, v in named_leaves(tree)}
        for item, tree in values.items()
    }


_checksum = jax.jit(checksum, static_argnums=1)


def verify(tree: Any, abstract: Any, where: Path) -> None:
    """Check that every leaf is an array of the expected shape and dtype.

    Orbax hands back a ShapeDtypeStruct for a leaf that the checkpoint lacks.

    Raises:
      UserError: naming the first leaf that is missing or different.
    """
    expected = jax.tree_util.tree_flatten_with_path(abstract)[0]
    found = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    for path, leaf in expected:
        value = found.get(path)
        if not isinstance(value, jax.Array):
            raise UserError(f"checkpoint {where} lacks {parameter_path(path)!r}")
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise UserError(
                f"checkpoint {where}: {parameter_path(path)!r} is "
                f"{value.dtype}{list(value.shape)}, the config needs "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
