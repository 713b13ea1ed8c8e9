"""Held-out text, and keeping it and its near copies out of training.

A tenth of the help pages is held out, chosen by a hash of the path. Pages share
snippets, so a split by page leaves a third of that text in training: paragraphs are
compared one by one as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from gamayun_jax.data.cleaning import normal_form
from gamayun_jax.demo_corpus import LANGUAGES, train_files

if TYPE_CHECKING:  # a corpus build needs no reader of pages
    from recipes.demo_data.extract_text import Document, Report

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


class NearDuplicateFinder:
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
    finders = {k: NearDuplicateFinder(texts, k in DENSE) for k, texts in held.items()}
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


def trained_paragraphs(language: str) -> list[str]:
    """All different paragraphs of the embedded training files of a language."""
    found: set[str] = set()
    for source, path in train_files().items():
        if source.split("/")[0] == language:
            with zstandard.open(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    found.update(json.loads(line)["text"].split("\n"))
    return sorted(found)
