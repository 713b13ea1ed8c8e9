"""The turns of a stage's sources in a random order of the whole stage.

A stage of n examples has n_s turns of source s. Numbered source by source, they are
put in the order of a keyed permutation of 0..n-1; at its turn a source serves the next
example of its own order, which is a shuffle already. So the stage is served as if all
its examples were shuffled together, but what a source has served is always the first
part of its order: cursors, resuming and rollbacks are as in any other stage.

The permutation is a Feistel network with cycle walking (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002) on whole numbers alone: the same on every machine
and in every release, at any place, in constant memory. Counts at block boundaries have
no closed form, so they are counted, in one pass over the stage: about 0.1 s for each
million examples, about a minute for the 610 million of 2.5T tokens.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np

ROUNDS = 8
PART = 1 << 18  # examples that are counted together
GOLDEN = 0x9E3779B97F4A7C15


def make_key(*parts: Any) -> int:
    """A key of 64 bits from any printable parts; the same everywhere."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def split_mix(first: int, count: int) -> np.ndarray:
    """`count` hashes, uint64, of `first` and the steps after it (SplitMix64; Steele et
    al., "Fast splittable pseudorandom number generators", 2014)."""
    z = np.uint64(first) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@functools.lru_cache(maxsize=4)
def round_tables(key: int, low: int, high: int) -> list[np.ndarray]:
    """Of each round what is added to one half of a number, by the other half: the low
    bits change the high ones, the high bits the low ones, by turns."""
    keys = split_mix(key, ROUNDS).tolist()
    widths = [(low, high), (high, low)] * (ROUNDS // 2)
    return [
        (split_mix(k, 1 << by) >> np.uint64(64 - of)).astype(np.uint32)
        for k, (by, of) in zip(keys, widths, strict=True)
    ]


def permuted(numbers: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of 0..n-1 takes some of them.

    Args:
      numbers: int64 [m], each in 0..n-1.
      n: at most 2**32.
    """
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    tables = round_tables(key, low, bits - low)

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> low, x & ((1 << low) - 1)
        for k in range(0, ROUNDS, 2):
            left = left ^ tables[k][right]
            right = right ^ tables[k + 1][left]
        return left << low | right

    x = encrypt(numbers.astype(np.uint32))
    # The network permutes all numbers of so many bits: go on from those beyond n.
    while (beyond := np.flatnonzero(x >= n)).size:
        x[beyond] = encrypt(x[beyond])
    return x.astype(np.int64)


def turns(totals: tuple[int, ...], key: int, begin: int, end: int) -> np.ndarray:
    """int32 [end - begin]: whose turn it is at places of a stage in which source s has
    totals[s] of them."""
    ends = np.cumsum(totals)
    places = permuted(np.arange(begin, end), int(ends[-1]), key)
    return np.searchsorted(ends, places, side="right").astype(np.int32)


@functools.lru_cache(maxsize=8)  # as curriculum.phase_counts
def turn_counts(totals: tuple[int, ...], key: int, size: int) -> np.ndarray:
    """int64 [b + 1, S]: turns of each source before each boundary of blocks of `size`
    examples, the last of which may be shorter."""
    n, sources = sum(totals), len(totals)
    blocks = -(-n // size)
    counts = np.zeros((blocks + 1, sources), np.int64)
    together = max(1, PART // size)
    for first in range(0, blocks, together):
        last = min(first + together, blocks)
        of = turns(totals, key, first * size, min(last * size, n))
        place = np.arange(len(of)) // size * sources + of
        found = np.bincount(place, minlength=(last - first) * sources)
        counts[first + 1 : last + 1] = found.reshape(-1, sources)
    np.cumsum(counts, axis=0, out=counts)
    counts.flags.writeable = False
    return counts
