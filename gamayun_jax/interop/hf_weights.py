"""The weights of Hugging Face folders, both ways, tensor by tensor.

The table of weights (model/weights.py) has their names. Memory holds the parameters
once and little else.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from gamayun_jax.config import ModelConfig, UserError
from gamayun_jax.data import files
from gamayun_jax.model.weights import WEIGHTS, size_of, weights_of
from gamayun_jax.storage import local_file

# Tables that old files hold and every model computes for itself.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPES = {v: k for k, v in FILE_DTYPES.items()}
BLOCK = 256  # rows of a matrix that are transposed at a time
READERS = 4  # threads; each holds one tensor of a file
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file, and where it belongs."""

    path: str  # of our parameter
    layer: int | None  # its row in the parameter, stacked over layers
    name: str
    shape: tuple[int, ...]
    transposed: bool  # ours is its transpose, but for the split of axes


def tensors_of(cfg: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a model, parameter by parameter.

    A matrix of theirs has two axes: the outputs of its product, then the inputs.
    """
    for w in weights_of(cfg):
        outputs = "".join(letter for letter in w.axes if letter not in w.summed)
        shape = tuple(size_of(cfg, axis) for axis in (outputs, w.summed) if axis)
        transposed = bool(w.summed) and w.axes.startswith(w.summed)
        for layer in range(cfg.num_layers) if w.stacked else (None,):
            name = w.hf_name.format(layer=layer)
            yield Tensor(w.path, layer, name, shape, transposed)


def convert(out: np.ndarray, value: np.ndarray, transposed: bool) -> None:
    """Copy and cast `value` to `out`, contiguous and of its size.

    One is a tensor of a file, at most a matrix; the other is ours, maybe with its heads
    in an axis of their own. Transposing goes in blocks that stay in the cache.
    """
    if not transposed:
        out.reshape(value.shape)[...] = value
        return
    rows, columns = value.shape if value.ndim == 2 else out.shape[::-1]
    value, out = value.reshape(rows, columns), out.reshape(columns, rows)
    for i in range(0, rows, BLOCK):
        out[:, i : i + BLOCK] = value[i : i + BLOCK].T


def all_finite(value: np.ndarray) -> bool:
    """Whether no exponent is all ones; several times as fast as isfinite.

    In blocks that stay in the cache.
    """
    bits = value.reshape(-1).view(f"u{value.itemsize}")
    magnitude = bits.dtype.type(2 ** (8 * value.itemsize - 1) - 1)
    infinity = int(np.array(np.inf, value.dtype).view(bits.dtype))
    return all(
        int((bits[i : i + BLOCK**2] & magnitude).max()) < infinity
        for i in range(0, len(bits), BLOCK**2)
    )


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that JAX's CPU backend takes over without a copy."""
    size, line = 4 * math.prod(shape), 64
    memory = np.empty(size + line, np.uint8)
    start = -memory.ctypes.data % line
    return memory[start : start + size].view(np.float32).reshape(shape)


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a Hugging Face folder.

    Raises:
      UserError: no safetensors, an index that does not fit its files or names one
        outside of the folder, or a damaged file.
    """
    single = folder / "model.safetensors"
    index = single.with_name("model.safetensors.index.json")
    if single.is_file():
        return dict.fromkeys(names_in(single), single)
    if not index.is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights as {pickles[0]}, a pickle, which may run "
                "any code: load it where you trust it and save_pretrained() it again, "
                "which writes safetensors"
            )
        raise UserError(f"{folder} has no model.safetensors and no index of several")
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: copy it again")
    for name in weight_map.values():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not plain or name.startswith("."):
            raise UserError(
                f"{index} names file {name!r}: only safetensors files in the same "
                "folder are read"
            )
    found: dict[str, Path] = {}
    for name in sorted(set(weight_map.values())):
        names = names_in(folder / name)
        listed = {k for k, v in weight_map.items() if v == name}
        if odd := sorted(listed ^ set(names)):
            raise UserError(
                f"{index} and {name} disagree about tensor {odd[0]!r}: copy them again"
            )
        found |= dict.fromkeys(names, folder / name)
    return found


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file; its errors become a UserError of one line."""
    try:
        with safetensors.safe_open(local_file(path), framework="np") as f:
            yield f
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again") from e


def names_in(path: Path) -> list[str]:
    """The names of the tensors of a safetensors file."""
    with open_tensors(path) as f:
        return list(f.keys())


def check_tensor(file: Any, path: Path, tensor: Tensor) -> None:
    """Compare shape and dtype in an open file's header with what is needed."""
    info = file.get_slice(tensor.name)
    dtype, shape = info.get_dtype(), tuple(info.get_shape())
    if shape != tensor.shape:
        raise UserError(
            f"{path}: {tensor.name} is {list(shape)}, the config needs "
            f"{list(tensor.shape)}"
        )
    if dtype not in FILE_DTYPES:
        raise UserError(
            f"{path}: {tensor.name} has dtype {dtype}; {', '.join(FILE_DTYPES)} are "
            "read"
        )


def read_tensor(path: Path, tensor: Tensor) -> np.ndarray:
    """One tensor in the dtype of its file, checked.

    The file is opened anew each time: what was mapped of it does not stay in memory.
    """
    with open_tensors(path) as f:
        check_tensor(f, path, tensor)
        value = f.get_tensor(tensor.name)
    if not all_finite(value):
        raise UserError(f"{path}: {tensor.name} has values that are not finite")
    return value


def match_tensors(
    folder: Path, where: Mapping[str, Path], cfg: ModelConfig
) -> dict[str, Tensor]:
    """The tensors of a model by name, all of them in the files and of their shapes.

    Raises:
      UserError: a tensor that is missing, left over, or of another shape or dtype.
    """
    if cfg.num_layers > len(where):  # before a number of any size is believed
        raise UserError(
            f"{folder} has {len(where)} tensors, the config {cfg.num_layers} layers"
        )
    expected = {t.name: t for t in tensors_of(cfg)}
    if missing := sorted(set(expected) - set(where)):
        raise UserError(
            f"{folder} lacks tensor {missing[0]!r} ({len(missing)} are missing)"
        )
    extra = {k for k in where if k not in expected and not COMPUTED.search(k)}
    head, table = (WEIGHTS[k].hf_name for k in ("unembedding", "embedding"))
    if head in extra and cfg.tie_embeddings:  # some writers store a tied head too
        own = read_tensor(where[head], expected[table]._replace(name=head))
        if np.array_equal(own, read_tensor(where[table], expected[table])):
            extra.remove(head)
    if extra:
        raise UserError(
            f"{folder} has tensor {min(extra)!r}, which the config has no place for "
            f"({len(extra)} are left over)"
        )
    for file in sorted(set(where.values())):
        with open_tensors(file) as f:
            for tensor in expected.values():
                if where[tensor.name] == file:
                    check_tensor(f, file, tensor)
    return expected


def read_weights(folder: Path, cfg: ModelConfig, shardings: Any = None) -> Any:
    """The parameters of a Hugging Face folder, float32, as the model has them.

    Args:
      shardings: of each parameter (a tree like theirs): each goes straight onto its
        devices, and the host holds one parameter at a time. Without it: on the
        default device.

    Raises:
      UserError: files that cannot be read, tensors that do not fit (`match_tensors`),
        values that are not finite.
    """
    where = find_tensors(folder)
    # All headers are checked before the first allocation.
    tensors = match_tensors(folder, where, cfg).values()
    placed = traverse_util.flatten_dict(shardings or {}, sep="/")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    for w in weights_of(cfg):
        value = aligned(w.full_shape(cfg))

        def read(tensor: Tensor, value: np.ndarray = value) -> None:
            part = read_tensor(where[tensor.name], tensor)
            out = value if tensor.layer is None else value[tensor.layer]
            convert(out, part, tensor.transposed)

        with futures.ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(read, (t for t in tensors if t.path == w.path)):
                pass
        params[w.path] = jax.make_array_from_callback(
            value.shape, placed.get(w.path, here), value.__getitem__
        )
        jax.block_until_ready(params[w.path])
    return traverse_util.unflatten_dict(params, sep="/")


def write_weights(
    params: Any,
    cfg: ModelConfig,
    folder: Path,
    max_shard_bytes: int = 4 * 2**30,
    dtype: str = "float32",
) -> list[Path]:
    """Write safetensors files of at most about `max_shard_bytes`, with their index.

    One parameter and one tensor at a time are in memory beside `params`; the library
    would need all of a file.

    Args:
      params: parameters, or functions that read them, each called once in its turn.

    Raises:
      UserError: values that are not finite.
    """
    values = traverse_util.flatten_dict(params, sep="/")
    width = jnp.dtype(dtype).itemsize
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors_of(cfg):
        needed = width * math.prod(tensor.shape)
        if needed > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= needed
    # The stacked parameter on the host, kept for the tensors of its other layers.
    at, host = "", np.empty(0)

    def converted(tensor: Tensor) -> np.ndarray:
        nonlocal at, host
        if tensor.path != at:
            at, value = tensor.path, values[tensor.path]
            host = np.empty(0)  # the one before goes first
            host = np.asarray(value() if callable(value) else value)
        out = np.empty(tensor.shape, jnp.dtype(dtype))
        with np.errstate(over="ignore"):  # checked in the next line
            convert(
                out,
                host if tensor.layer is None else host[tensor.layer],
                tensor.transposed,
            )
        if not all_finite(out):
            raise UserError(f"{tensor.path} has values that {dtype} cannot hold")
        return out

    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        many = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = folder / f"model{many}.safetensors"
        write_shard(path, shard, dtype, map(converted, shard))
        paths.append(path)
        weight_map |= {tensor.name: path.name for tensor in shard}
    if len(shards) > 1:
        total = sum(width * math.prod(t.shape) for t in tensors_of(cfg))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)
    return paths


def write_shard(
    path: Path, tensors: Sequence[Tensor], dtype: str, values: Iterable[np.ndarray]
) -> None:
    """One safetensors file: the header's length, the header, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + jnp.dtype(dtype).itemsize * math.prod(t.shape)
        header[t.name] = dict(
            dtype=DTYPES[dtype], shape=t.shape, data_offsets=[begin, end]
        )
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.atomic(path) as temporary, open(temporary, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            f.write(value.view(np.uint8).data)
