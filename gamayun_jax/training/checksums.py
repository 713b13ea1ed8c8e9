"""Whether what is read of a checkpoint is what was written: checksums and shapes.

An array's checksum is taken from the values themselves, where they are: one pass over
memory, no pass over files, and the same on any mesh.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gamayun_jax.config import UserError
from gamayun_jax.model.weights import parameter_path

BLOCK = 2**16  # elements at a time: they and their products stay in the core's cache
ODD = 2 * np.arange(BLOCK, dtype=np.uint32) + 1


def json_sha256(data: Any) -> str:
    """Hash of plain JSON data, whatever the order of its keys."""
    text = json.dumps(json.loads(json.dumps(data)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(parameter_path(path), leaf) for path, leaf in leaves]


def checksum(x: jax.Array) -> jax.Array:
    """uint32 of an array's values and their places: the sum of each element's bits
    times an odd number of its place, modulo 2**32.

    Integers add up the same in any order, so on any mesh. Any change of one element
    changes the sum, since an odd number has an inverse; more escape once in 2**32.
    """
    x = x if _has_own_bits(x.dtype) else x.astype(jnp.int32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    odd = jnp.ones(x.shape, jnp.uint32)
    stride = 2
    for axis in reversed(range(x.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        odd += iota * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
    """`checksum` of an array in the host's memory, which has to compile nothing."""
    x = x if _has_own_bits(x.dtype) else x.astype(np.int32)
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}")
    total = 0
    for first in range(0, bits.size, BLOCK):
        block = bits[first : first + BLOCK].astype(np.uint32, copy=False)
        total += int((block * ODD[: block.size]).sum(dtype=np.uint32))
        total += 2 * first * int(block.sum(dtype=np.uint32))
    return total % 2**32


def _has_own_bits(dtype: Any) -> bool:
    """Whether they are summed as they are; others as those of int32."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in (1, 2, 4)


def checksums(items: dict[str, Any]) -> dict[str, dict[str, str]]:
    """item -> path -> checksum of each array, in hexadecimal."""

    def of(x: Any) -> Any:
        x = jnp.asarray(x)
        (device, *others) = x.sharding.device_set
        if device.platform == "cpu" and not others:  # NumPy sees it without a copy
            return host_checksum(np.asarray(x))
        return jax.device_get(_checksum(x))

    # One array at a time: together they would take the memory of all of them again.
    values = jax.tree.map(of, items)
    return {
        item: {name: f"{int(v):08x}" for name, v in named_leaves(tree)}
        for item, tree in values.items()
    }


_checksum = jax.jit(checksum)


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
