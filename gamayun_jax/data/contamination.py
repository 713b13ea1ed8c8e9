"""Held-out texts inside of training documents, which a corpus build keeps out.

Texts are compared as letters alone: case, spaces and signs are nothing, and digits
are alike. Every run of letters of a document is looked up in one table of hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from gamayun_jax.data.cleaning import normal_form


@cache
def letters_table() -> np.ndarray:
    """uint32 [65536]: code -> the code of its letter without case, of "0" for a digit,
    0 for all other characters."""
    table = np.zeros(1 << 16, np.uint32)
    for character in map(chr, range(1 << 16)):
        if character.isalnum():
            normal = normal_form("NFKC", character).casefold()
            table[ord(character)] = ord("0" if normal.isdecimal() else normal[0])
    return table


def letters(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [L]: codes of the letters of all texts; int64 [N]: where each one ends."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    folded = letters_table().take(codes, mode="clip")
    high = codes > 0xFFFF
    if high.any():
        folded[high] = codes[high]
    kept = np.flatnonzero(folded)
    ends = np.cumsum([len(text) for text in texts])
    return folded.take(kept), np.searchsorted(kept, ends)


def window_hashes(codes: np.ndarray, width: int) -> np.ndarray:
    """uint32 [L - width + 1]: hash of every run of `width` (a power of 2) letters."""
    hashes, size = codes, 1
    while size < width:
        factor = np.uint32(0x9E3779B1 + 2 * size)
        hashes = hashes[:-size] * factor + hashes[size:]
        size *= 2
    return hashes


NEVER = 1 << 30  # runs that no document has
MOST_MATCHES = 1 << 22  # of runs and held-out texts, looked at together: 150 MB


@dataclass(frozen=True)
class Unit:
    """A held-out text that a document holds, or equals."""

    set: str
    id: str
    equal: bool = False


class Contamination:
    """Finds held-out texts inside of training documents; case, spaces and signs are
    nothing, digits are alike.

    Of a held-out text, runs of 16 letters are looked for, one in 8 (text mostly in
    ideographs, kana or hangul: 8 and one in 4). A document holds the text if it has
    half of these runs, 24 of a long one, and no fewer than 4 of them, about eight
    words; if there are fewer, all. A document that is a part of the text, a line say,
    is held too: half of its own runs are the text's, and no fewer than 4. A text of
    fewer than 30 letters (12) must be the document.
    """

    def __init__(self, name: str = "", units: Sequence[tuple[str, str]] = ()):
        self.short = 0  # units that are looked for only as whole documents
        self._units: list[Unit] = []
        self._needed: list[int] = []
        self._whole: dict[bytes, int] = {}  # letters of a short one -> unit
        self._exact: dict[str, int] = {}
        self._runs: dict[int, list[np.ndarray]] = {16: [], 8: []}  # (hash, unit) [n, 2]
        self._tables: dict[int, tuple[np.ndarray, ...]] | None = None
        self.add(name, units)

    def add(self, name: str, units: Sequence[tuple[str, str]]) -> None:
        """Look for these (id, text) too, as the set `name`."""
        base, texts = len(self._units), [text for _, text in units]
        self._units += [Unit(name, id) for id, _ in units]
        codes, ends = letters(texts)
        begins = np.append(0, ends[:-1])[: len(ends)]
        sizes = ends - begins
        dense_before = np.append(0, np.cumsum(codes >= 0x2E80))
        dense = 2 * (dense_before[ends] - dense_before[begins]) > sizes
        short = sizes < np.where(dense, 12, 30)
        self.short += int(short.sum())
        for k, text in enumerate(texts):
            self._exact.setdefault(text, base + k)
        for k in np.flatnonzero(short).tolist():
            self._whole.setdefault(codes[begins[k] : ends[k]].tobytes(), base + k)
        needed = np.ones(len(texts), np.int64)
        for width, step, mine in ((16, 8, ~dense & ~short), (8, 4, dense & ~short)):
            if not mine.any():
                continue
            last = sizes[mine] - width  # where its last run begins
            count = -(-last // step) + 1
            owner = np.repeat(np.flatnonzero(mine), count)
            place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
            place = np.minimum(place * step, np.repeat(last, count)) + begins[owner]
            hashes = window_hashes(codes, width)[place].astype(np.uint64)
            # A run that comes twice in a text counts once.
            pairs = np.unique(owner.astype(np.uint64) << np.uint64(32) | hashes)
            number = (pairs >> np.uint64(32)).astype(np.int64)
            runs = np.bincount(number, minlength=len(texts))
            least = np.minimum(runs, np.maximum((runs + 1) // 2, 4))
            # One run over and over, of digits say, is in too much.
            least = np.where(runs < 2, NEVER, np.minimum(least, 24))
            needed = np.where(mine, least, needed)
            self.short += int((mine & (runs < 2)).sum())
            columns = [pairs.astype(np.uint32), (number + base).astype(np.uint32)]
            self._runs[width].append(np.stack(columns, axis=1))
        self._needed += needed.tolist()
        self._tables = None

    def _table(self, width: int) -> tuple[np.ndarray, ...]:
        """(sieve bool[2**k] of hashes' first bits, hashes sorted, their units)."""
        if self._tables is None:
            self._tables = {}
            for size, runs in self._runs.items():
                rows = np.concatenate([np.zeros((0, 2), np.uint32), *runs])
                rows = rows[np.argsort(rows[:, 0], kind="stable")]
                bits = min(max(int(len(rows) * 32).bit_length(), 12), 26)
                sieve = np.zeros(1 << bits, bool)
                sieve[rows[:, 0] >> np.uint32(32 - bits)] = True
                self._tables[size] = (sieve, rows[:, 0].copy(), rows[:, 1].copy())
        return self._tables[width]

    def judge(self, texts: Sequence[str]) -> Sequence[Sequence[Unit]]:
        """For each text the held-out ones that it holds."""
        verdicts: list[list[Unit]] = [[] for _ in texts]
        codes, ends = letters(texts)
        begins, needed = np.append(0, ends[:-1]), np.array(self._needed)
        for k, text in enumerate(texts):
            if (number := self._exact.get(text)) is not None:
                verdicts[k].append(replace(self._units[number], equal=True))
        few = np.flatnonzero(ends - begins < 30).tolist() if self._whole else []
        for k in few:
            number = self._whole.get(codes[begins[k] : ends[k]].tobytes())
            if number is not None and begins[k] < ends[k] and not verdicts[k]:
                verdicts[k].append(self._units[number])
        for width in (16, 8):
            sieve, hashes, units = self._table(width)
            if not len(hashes) or len(codes) < width:
                continue
            if width == 8 and not (codes >= 0x2E80).any():
                continue
            mine = window_hashes(codes, width)
            bits = len(sieve).bit_length() - 1
            at = np.flatnonzero(sieve.take(mine >> np.uint32(32 - bits)))
            place = np.searchsorted(hashes, mine[at])
            at = at[hashes.take(place, mode="clip") == mine[at]]
            of = np.searchsorted(ends, at, "right")
            inside = at + width <= ends[of]
            at, of = at[inside], of[inside]
            pairs = np.unique(of.astype(np.uint64) << np.uint64(32) | mine[at])
            of, wanted = pairs >> np.uint64(32), pairs.astype(np.uint32)
            first = np.searchsorted(hashes, wanted, "left")
            count = np.searchsorted(hashes, wanted, "right") - first
            # Every run may be one of several units; of many, fewer texts at a time.
            if count.sum() > MOST_MATCHES and len(texts) > 1:
                half = len(texts) // 2
                return [*self.judge(texts[:half]), *self.judge(texts[half:])]
            of = np.repeat(of, count)
            within = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
            unit = units[np.repeat(first, count) + within]
            pairs, times = np.unique(of << np.uint64(32) | unit, return_counts=True)
            sizes = (ends - begins)[(pairs >> np.uint64(32)).astype(np.int64)]
            # Of the document's own runs one in `width / 2` is looked for.
            own = np.maximum(-(-(sizes - width) // width), 4)
            least = np.minimum(needed[pairs.astype(np.uint32)], own)
            for pair in pairs[times >= least].tolist():
                verdict = verdicts[pair >> 32]
                if not (verdict and verdict[0].equal):
                    verdict.append(self._units[pair & 0xFFFFFFFF])
        return verdicts
