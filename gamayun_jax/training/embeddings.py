"""Embeddings of a model for another tokenizer, or for more rows.

A piece that both tokenizers have keeps its row. A new one gets the mean of the rows of
the former pieces that spell it (Gee et al. 2022, "Fast Vocabulary Transfer", EMNLP
industry track), or the mean of all rows (Hewitt 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from gamayun_jax.config import ModelConfig
from gamayun_jax.data.tokenizer import TextCoder
from gamayun_jax.model.weights import WEIGHTS

TABLES = ("embedding", "unembedding")


class Rows(NamedTuple):
    """Which former rows each row of a table is the mean of.

    R rows of the table, at most K former rows for each.
    """

    ids: np.ndarray  # int32 [R, K]
    weights: np.ndarray  # float32 [R, K]: 1/n for n former rows, 0 beyond them
    known: int  # former rows that have a token: the mean of all is theirs
    counts: Mapping[str, int]  # rows that are kept, of pieces, the mean of all


def plan_rows(old: TextCoder, new: TextCoder, rows: int, pieces: bool) -> Rows:
    """What becomes of each of `rows` rows when `new` takes the place of `old`.

    What begins and ends documents goes by what it does, other control tokens by their
    text. Rows without a token, and without `pieces` all that `old` does not have, are
    the mean of all rows.
    """
    spelled = [old.spell([i]) for i in range(old.vocab_size)]
    # Of equal ones the last: of an ASCII character SentencePiece has byte and piece.
    by_bytes = {s: i for i, s in enumerate(spelled) if s}
    by_text = {old.token_text(i): i for i, s in enumerate(spelled) if not s}
    roles = list(zip(new.boundaries, old.boundaries, strict=True))
    by_role = dict([roles[2], roles[0], roles[1]])  # the end, where it has all three
    sources: list[list[int]] = []
    unknown: dict[int, bytes] = {}
    kept = 0
    for i in range(new.vocab_size):
        piece, text = new.spell([i]), new.token_text(i)
        same = i < old.vocab_size and spelled[i] == piece
        if not piece:
            same &= old.token_text(i) == text
        found: int | None = i
        if i in by_role:
            found = by_role[i]
        elif not same:
            found = by_bytes.get(piece) if piece else by_text.get(text)
        sources.append([] if found is None else [found])
        kept += found is not None
        if found is None and piece:
            unknown[i] = piece
    if pieces:
        for i, ids in decompose(old, unknown, by_bytes).items():
            sources[i] = ids
    sources += [[]] * (rows - len(sources))
    longest = max(map(len, sources))
    ids_RK = np.zeros((rows, longest), np.int32)
    weights_RK = np.zeros((rows, longest), np.float32)
    for i, ids in enumerate(sources):
        ids_RK[i, : len(ids)] = ids
        weights_RK[i, : len(ids)] = 1 / max(len(ids), 1)
    mean = sum(not ids for ids in sources)
    counts = {"kept": kept, "pieces": rows - kept - mean, "mean": mean}
    return Rows(ids_RK, weights_RK, old.vocab_size, counts)


def decompose(
    old: TextCoder, pieces: Mapping[int, bytes], by_bytes: Mapping[bytes, int]
) -> dict[int, list[int]]:
    """The former tokens that spell each piece: as `old` encodes it or, where it is no
    text or `old` adds or changes something, the longest that fit from its beginning."""
    texts: dict[int, str] = {}
    for i, piece in pieces.items():
        try:
            texts[i] = piece.decode()
        except UnicodeDecodeError:
            continue
    found = dict(zip(texts, old.encode_batch(list(texts.values())), strict=True))
    longest = max(map(len, by_bytes), default=0)
    for i, piece in pieces.items():
        if i in found and old.spell(found[i]) == piece:
            continue
        found[i] = []
        begin = 0
        while begin < len(piece):
            ends = range(min(len(piece), begin + longest), begin, -1)
            end = next((e for e in ends if piece[begin:e] in by_bytes), 0)
            if not end:  # a byte that `old` cannot spell
                found[i] = []
                break
            found[i].append(by_bytes[piece[begin:end]])
            begin = end
    return found


def former_abstract(abstract: Any, model: ModelConfig) -> Any:
    """The abstract parameters of `model`, which differs from that of `abstract` in the
    rows of its tables alone; on the same devices, divided if they are divisible."""
    flat = traverse_util.flatten_dict(abstract, sep="/")
    for name in TABLES:
        if name not in flat:
            continue
        shape, placed = WEIGHTS[name].full_shape(model), flat[name].sharding
        try:
            placed.shard_shape(shape)
        except ValueError:
            placed = NamedSharding(placed.mesh, PartitionSpec())
        flat[name] = jax.ShapeDtypeStruct(shape, flat[name].dtype, sharding=placed)
    return traverse_util.unflatten_dict(flat, sep="/")


def exchange(params: Any, rows: Rows, abstract: Any) -> Any:
    """The parameters with the tables that `rows` makes of theirs, placed as `abstract`.

    Each row is a sum in one order, so that its bits do not depend on the devices, but
    for the mean of all.
    """

    def new_table(table_VD: jax.Array, ids_RK: Any, weights_RK: Any) -> jax.Array:
        def add(k: Any, sum_RD: jax.Array) -> jax.Array:
            return sum_RD + table_VD[ids_RK[:, k]] * weights_RK[:, k, None]

        shape = (ids_RK.shape[0], table_VD.shape[1])
        zeros_RD = jnp.zeros(shape, table_VD.dtype)
        sum_RD = jax.lax.fori_loop(0, ids_RK.shape[1], add, zeros_RD)
        mean_D = table_VD[: rows.known].mean(axis=0)
        return jnp.where(weights_RK[:, :1] > 0, sum_RD, mean_D)

    flat = traverse_util.flatten_dict(params, sep="/")
    placed = traverse_util.flatten_dict(abstract, sep="/")
    for name in TABLES:
        if name in flat:
            make = jax.jit(new_table, out_shardings=placed[name].sharding)
            flat[name] = make(flat[name], rows.ids, rows.weights)
    return traverse_util.unflatten_dict(flat, sep="/")
