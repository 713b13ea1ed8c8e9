"""Held-out text, and keeping it and its near copies out of training.

A tenth of the help pages is held out, chosen by a hash of the path. Pages share
snippets, so a split by page leaves a third of that text in training: paragraphs are
compared one by one as well.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from gamayun_jax.demo_corpus import LANGUAGES
from gamayun_jax.documents import normal_form

if TYPE_CHECKING:  # a corpus build needs no reader of pages
    from gamayun_jax.pages import Document, Report

DENSE = ("zh", "ja", "ko")  # a character says as much as two or three letters
SCRIPTS = dict(ru="[а-яё]", zh="[一-鿿]", ja="[ぁ-ヿ一-鿿]", ko="[가-힣]")
# Words that tell English from the eleven other languages.
ENGLISH = re.compile(r"\b(the|of|and|with|this|that|which|from|you|your|are)\b", re.I)


def rejection(text: str, language: str, english: set[str]) -> str:
    """Why a paragraph is no text of the language, "" if it is; `english`: originals."""
    if not text.isprintable():
        return "unprintable characters"
    letters = sum(c.isalpha() for c in text)
    if 2 * letters < len(text) - text.count(" "):
        return "numbers and signs"
    if language == "en":
        return ""
    if text in english and re.search("[A-Za-z]{3}", text):
        return "not translated"
    if len(ENGLISH.findall(text)) >= 3:
        return "not translated"
    own = len(re.findall(SCRIPTS.get(language, r"\w"), text, re.IGNORECASE))
    return "not in the language's script" if own < 0.3 * letters else ""


def keep_language(documents: Sequence[Document], report: Report) -> list[Document]:
    """Documents without the paragraphs that are not in their language."""
    english: dict[str, set[str]] = defaultdict(set)
    for doc in documents:
        if doc.language == "en":
            english[doc.domain].update(doc.paragraphs.values())
    kept = []
    for doc in documents:
        good = {}
        for key, text in doc.paragraphs.items():
            if why := rejection(text, doc.language, english[doc.domain]):
                report.rejected[f"{doc.language}/{doc.domain}"][why] += 1
            else:
                good[key] = text
        kept.append(replace(doc, paragraphs=good))
    return kept


def normalise(text: str, dense: bool = False) -> str:
    """Letters alone, without case, each number a 0: what near duplicates agree in.

    `dense`: for scripts without spaces; a Latin word (mostly the name of a product)
    then counts as one letter, or it would outweigh the text around it.
    """
    text = normal_form("NFKC", text).casefold()
    text = re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text))
    return (re.sub(r"[a-z]+", "a", text) if dense else text).replace(" ", "")


class HeldOut:
    """Finds held-out texts, and near copies of them, among training paragraphs.

    Texts are compared as sets of shingles: runs of 13 letters (dense scripts: 6) of
    the normalised text. A near copy has half of the shingles of a held-out text, or
    half of its own in one, if it has 13 (6) or more: a heading may be part of a text.
    """

    def __init__(self, texts: Iterable[str], dense: bool = False):
        held = sorted(set(texts))
        self.dense, self.width = dense, 6 if dense else 13
        self._exact = set(held)
        normal, hashes, owners = self._shingles(held)
        self._normal = set(normal)
        pairs = np.unique(np.stack([hashes, owners.astype(np.uint64)], axis=1), axis=0)
        self._hashes, self._owners = pairs[:, 0], pairs[:, 1].astype(np.int64)
        self._sizes = np.bincount(self._owners, minlength=len(held))

    def _shingles(
        self, texts: Sequence[str]
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Normal texts; of each shingle its hash, uint64 [n], and text, int64 [n]."""
        normal = [normalise(text, self.dense) for text in texts]
        codes = np.frombuffer("".join(normal).encode("utf-32-le"), np.uint32)
        count = max(0, len(codes) - self.width + 1)
        hashes = np.zeros(count, np.uint64)
        for k in range(self.width):  # wraps around modulo 2**64, as intended
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + count] + 1
        owner = np.repeat(np.arange(len(texts)), [len(t) for t in normal])
        inside = owner[:count] == owner[len(owner) - count :]
        return normal, hashes[inside], owner[:count][inside]

    def judge(self, texts: Sequence[str]) -> list[str]:
        """For each text "exact", "near" or ""."""
        normal, hashes, owner = self._shingles(texts)
        verdicts = [
            "exact" if t in self._exact else "near" if n in self._normal else ""
            for t, n in zip(texts, normal, strict=True)
        ]
        place = np.searchsorted(self._hashes, hashes)
        hit = np.append(self._hashes, 0)[place] == hashes
        starts = np.searchsorted(owner, np.arange(len(texts) + 1))
        for k in np.unique(owner[hit]):
            own = np.unique(hashes[starts[k] : starts[k + 1]])
            if not verdicts[k] and self._near(own):
                verdicts[k] = "near"
        return verdicts

    def _near(self, own: np.ndarray) -> bool:
        first = np.searchsorted(self._hashes, own, "left")
        last = np.searchsorted(self._hashes, own, "right")
        spans = [self._owners[a:b] for a, b in zip(first, last, strict=True) if b > a]
        shared = np.bincount(np.concatenate([*spans, np.zeros(0, np.int64)]))
        if len(own) >= self.width and 2 * shared.max(initial=0) >= len(own):
            return True
        return bool((2 * shared >= self._sizes[: len(shared)])[shared > 0].any())


@cache
def letters_table() -> np.ndarray:
    """uint32 [65536]: code -> that of its letter without case, "0" for a digit, 0 for
    what is neither."""
    table = np.zeros(1 << 16, np.uint32)
    for character in map(chr, range(1 << 16)):
        if character.isalnum():
            normal = normal_form("NFKC", character).casefold()
            table[ord(character)] = ord("0" if normal.isdecimal() else normal[0])
    return table


def letters(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [L]: codes of the letters of all texts; int64 [N]: where each one ends."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    found = letters_table().take(codes, mode="clip")
    high = codes > 0xFFFF
    if high.any():
        found[high] = codes[high]
    kept = np.flatnonzero(found)
    ends = np.cumsum([len(text) for text in texts])
    return found.take(kept), np.searchsorted(kept, ends)


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
            rows = [pairs.astype(np.uint32), (number + base).astype(np.uint32)]
            self._runs[width].append(np.stack(rows, axis=1))
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
        found: list[list[Unit]] = [[] for _ in texts]
        codes, ends = letters(texts)
        begins, needed = np.append(0, ends[:-1]), np.array(self._needed)
        for k, text in enumerate(texts):
            if (number := self._exact.get(text)) is not None:
                found[k].append(replace(self._units[number], equal=True))
        few = np.flatnonzero(ends - begins < 30).tolist() if self._whole else []
        for k in few:
            number = self._whole.get(codes[begins[k] : ends[k]].tobytes())
            if number is not None and begins[k] < ends[k] and not found[k]:
                found[k].append(self._units[number])
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
                those = found[pair >> 32]
                if not (those and those[0].equal):
                    those.append(self._units[pair & 0xFFFFFFFF])
        return found


def digest(*words: str) -> str:
    """Hexadecimal SHA-256 of words: a fixed order, the same in every build."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def is_heldout_page(path: str) -> bool:
    """A tenth of the help pages (and of the packages' descriptions, which test items
    are made of), the same in every language and every build."""
    return int(digest("held out", path)[:8], 16) % 10 == 0


def heldout_units(
    documents: Sequence[Document], languages: Sequence[str], limit: int | None
) -> dict[str, dict[str, str]]:
    """Language -> "page#paragraph" -> text: the same ids, in the same order.

    A unit has 40 to 600 characters in English, and a translation in each language,
    unlike any other unit's. The first `limit` by hash are also in a larger set.
    """
    units: dict[str, dict[str, str]] = {language: {} for language in languages}
    for doc in documents:
        if doc.domain == "help" and is_heldout_page(doc.path):
            for key, text in doc.paragraphs.items():
                units[doc.language][f"{doc.path}#{key}"] = text
    seen: set[tuple[str, str]] = set()
    chosen: list[str] = []
    for name in sorted(units["en"], key=lambda n: digest("unit", n)):
        texts = {(k, normalise(units[k].get(name, ""), k in DENSE)) for k in languages}
        long = 40 <= len(units["en"][name]) <= 600
        if long and min(len(t) for _, t in texts) >= 10 and not texts & seen:
            chosen.append(name)
            seen |= texts
    chosen = sorted(chosen[:limit])
    return {k: {name: units[k][name] for name in chosen} for k in languages}


def keep_out(
    documents: Sequence[Document], held: Mapping[str, Sequence[str]], report: Report
) -> Iterator[Document]:
    """Documents without held-out pages, held-out paragraphs and near copies of them.

    `held`: language -> texts. English ones are looked for in every language, and a
    paragraph goes whose English counterpart does.
    """
    finders = {k: HeldOut(texts, k in DENSE) for k, texts in held.items()}
    gone: set[tuple[str, str]] = set()  # (page, id) of help
    # English comes first: its verdicts hold for the translations.
    for doc in sorted(documents, key=lambda d: LANGUAGES.index(d.language)):
        counts = report.rejected[f"{doc.language}/{doc.domain}"]
        if doc.domain in ("help", "descriptions") and is_heldout_page(doc.path):
            counts["held out: page"] += len(doc.paragraphs)
            continue
        texts = list(doc.paragraphs.values())
        own = finders[doc.language].judge(texts)
        also = own if doc.language == "en" else finders["en"].judge(texts)
        good = {}
        for key, text, *found in zip(doc.paragraphs, texts, own, also, strict=True):
            counterpart = doc.domain == "help" and (doc.path, key) in gone
            verdict = found[0] or found[1] or ("in English" if counterpart else "")
            if not verdict:
                good[key] = text
                continue
            counts[f"held out: {verdict}"] += 1
            if doc.language == "en" and doc.domain == "help":
                gone.add((doc.path, key))
        yield replace(doc, paragraphs=good)
