"""A model made from another: a folder with one checkpoint that holds parameters alone.

Whatever reads a run folder's newest checkpoint reads it. A run cannot go on in it, as
it has no optimiser's state; one can begin from it, with moments of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from gamayun_jax.config import ModelConfig
from gamayun_jax.data import files
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.model.weights import weights_of
from gamayun_jax.storage import with_checkpoints
from gamayun_jax.training.checkpoint import Checkpoints, TrainState
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.ticker import ticker


def save_model(params: Any, meta: RunMeta, tokenizer: TextCoder, out: Path) -> None:
    """Write parameters as a checkpoint with its tokenizer, whole or not at all.

    Raises:
      UserError: `out` exists, or cannot be written.
    """
    with_checkpoints(out)
    with files.new_folder(out) as temporary:
        write_params(params, meta, temporary)
        tokenizer.write(temporary)


def write_params(params: Any, meta: RunMeta, folder: Path) -> None:
    """Write parameters as the one checkpoint of a folder, at the step of its meta.

    Raises:
      UserError: it cannot be written.
    """
    limit = largest_bytes(meta.config.model)
    store = Checkpoints(folder / "checkpoints", in_flight=limit)
    try:
        store.save(TrainState(jnp.int32(meta.step), params, {}), meta)
        store.wait()
    finally:
        store.close()


def largest_bytes(cfg: ModelConfig) -> int:
    """Of the largest float32 parameter: what a disk is given to do at a time."""
    return max(4 * math.prod(w.full_shape(cfg)) for w in weights_of(cfg)) + 2**20


def on_host(tree: Any) -> Any:
    """Abstract arrays as they are read into this machine's memory, of which it may have
    more than its devices."""
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), tree
    )


@contextlib.contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Give what is freed back to the system at once (with glibc; elsewhere: no-op).

    malloc keeps it for each of the threads that read or write a checkpoint: together
    half as much again as a large model's parameters.
    """
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        yield
        return
    with ticker(0.05, lambda: trim(0)):
        yield
