"""Held-out sets of a corpus: reading their files, describing them in its manifest."""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import CorpusConfig, HeldoutConfig, SourceConfig, UserError
from gamayun_jax.data.cleaning import clean
from gamayun_jax.data.contamination import Contamination
from gamayun_jax.data.documents import BadDocument
from gamayun_jax.data.files import file_sha256, write_json_lines
from gamayun_jax.data.inputs import expand, read_documents

Units = list[tuple[str, str]]  # (id, text) of each unit


@dataclass(frozen=True)
class HeldoutSet:
    """Cleaned units of each language, in the order of the files."""

    name: str
    units: Mapping[str, Units]
    parallel: bool
    unlike_ids: str  # why it may not be taken for parallel; "" if nothing speaks for it


def read_heldout(cfg: CorpusConfig) -> list[HeldoutSet]:
    """The held-out sets of a corpus config.

    Raises:
      UserError: any unit that cannot be read, an id that comes twice, or parallel files
        that do not match.
    """
    return [read_set(spec) for spec in cfg.heldout]


def read_set(spec: HeldoutConfig) -> HeldoutSet:
    units: dict[str, Units] = {}
    named = True  # has every unit an id of its own?
    for language, file in spec.files.items():
        at = f"corpus.heldout[{spec.name!r}].files[{language!r}]"
        units[language], all_named = read_units(at, file)
        named = named and all_named
    if not units:
        raise UserError(f"held-out set {spec.name!r} has no files: give some")
    why = unlike_ids(units)
    if spec.parallel and why:
        raise UserError(
            f"held-out set {spec.name!r} is parallel, but {why}: give the same units "
            "in the same order, or leave parallel out"
        )
    if spec.parallel is None and not why:
        if not named:
            why = "there are units without an id"
        elif low := unlike_lengths(units):  # numbers of lines, as a rule
            told = ", ".join(f"{k} {r}" for k, r in low.items())
            why = (
                "ids are the same, but lengths are not those of translations "
                f"(correlation with {next(iter(units))}: {told})"
            )
    parallel = spec.parallel or (spec.parallel is None and not why)
    return HeldoutSet(spec.name, units, parallel, "" if spec.parallel is False else why)


def read_units(at: str, file: str) -> tuple[Units, bool]:
    """(id, cleaned text) of a file's units, and whether each has an id of its own; a
    unit without one goes by its number."""
    units: list[tuple[str, str]] = []
    lines: dict[str, int] = {}
    named = True
    source = SourceConfig(at, (file,))
    if [item.files for item in expand(source)] != [(file,)]:
        raise UserError(f"{at}: {file!r} is no single file: give one, with all units")
    for unit in read_documents(source):
        where = f"{at}: {file}:{unit.line}"
        if isinstance(unit, BadDocument):
            why = f" ({unit.detail})" if unit.detail else ""
            raise UserError(f"{where}: {unit.reason}{why}")
        text = clean(unit.text)
        if not text:
            raise UserError(f"{where} has no text: take the unit out")
        named = named and unit.id is not None
        id = str(len(units)) if unit.id is None else unit.id
        id = id.encode("utf-8", "backslashreplace").decode()
        if id in lines:
            what = "id" if unit.id is not None else "no id, so its number"
            raise UserError(
                f"{where} has {what} {id!r}, as line {lines[id]} has: give each unit "
                "an id of its own"
            )
        lines[id] = unit.line
        units.append((id, text))
    if not units:
        raise UserError(f"{at}: {file} is empty: take it out of corpus.heldout")
    return units, named


def unlike_ids(units: Mapping[str, Units]) -> str:
    """Where the ids of a set's languages first differ; "" if they do not."""
    (first, own), *others = units.items()
    for language, theirs in others:
        if len(own) != len(theirs):
            return f"{language} has {len(theirs)} units and {first} {len(own)}"
        for k, ((mine, _), (other, _)) in enumerate(zip(own, theirs, strict=True), 1):
            if mine != other:
                return (
                    f"{language} has id {other!r} at unit {k}, where {first} has "
                    f"{mine!r}"
                )
    return ""


def unlike_lengths(units: Mapping[str, Units]) -> dict[str, float]:
    """Language -> correlation of its units' log lengths with the first language's,
    where it is too low for translations (which have 0.8 and more)."""
    logs = {k: np.log([len(t) for _, t in u]) for k, u in units.items()}
    first, *others = logs
    low = {}
    for k in others:
        # Few units, or all of one length, tell nothing.
        if len(logs[k]) >= 20 and min(logs[first].std(), logs[k].std()) > 0.1:
            r = float(np.corrcoef(logs[first], logs[k])[0, 1])
            if r < 0.5:
                low[k] = round(r, 3)
    return low


def write_heldout(sets: Sequence[HeldoutSet], folder: Path) -> None:
    """<set>.<language>.jsonl of every set, as the corpus has them."""
    for held in sets:
        for language, units in held.units.items():
            rows = ({"id": i, "text": text} for i, text in units)
            write_json_lines(folder / f"{held.name}.{language}.jsonl", rows)


def describe(
    held: HeldoutSet, folder: Path, copies: str, max_units: int
) -> dict[str, Any]:
    """The manifest's entry of a set.

    Args:
      folder: of the written sets.
      copies: CorpusConfig.held_out_copies.
      max_units: how many of its units an evaluation scores; 0 is all.
    """
    languages: dict[str, Any] = {}
    for language, units in held.units.items():
        # The texts that an evaluation scores: all, or as many as the config says.
        scored = (subsample_units(units, n) for n in (0, max_units))
        texts = ["\n".join(t for _, t in s).encode() for s in scored]
        languages[language] = {
            "units": len(units),
            "bytes": sum(len(t.encode()) for _, t in units),
            "sha256": file_sha256(folder / f"{held.name}.{language}.jsonl"),
            "short": Contamination(held.name, units).short,
            "xz": {text_key(t): xz_bytes(t) for t in texts},
        }
    return {
        "parallel": held.parallel,
        "languages": languages,
        "unlike_lengths": unlike_lengths(held.units) if held.parallel else {},
        "unlike_ids": "" if held.parallel else held.unlike_ids,
        "copies": copies,
    }


def subsample_units(units: Units, limit: int) -> Units:
    """The first `limit` units by the hash of their id: the same in every language.

    Empty units stay, at 0 bits: without one, a language's units were not the others'.
    """
    if not limit or limit >= len(units):
        return units
    return sorted(units, key=lambda u: hashlib.sha256(u[0].encode()).digest())[:limit]


def halves(units: Units) -> tuple[Units, Units]:
    """About half of the units, to tune something on, and the others.

    By the hash of their id without its last number, the same in every language:
    paragraphs "article.7.1" and "article.7.2" stay together.
    """
    parts: tuple[Units, Units] = ([], [])
    for id, text in units:
        document = re.sub(r"[^0-9A-Za-z]?[0-9]+$", "", id) or id
        parts[hashlib.sha256(document.encode()).digest()[0] % 2].append((id, text))
    return parts


def text_key(text: bytes) -> str:
    """The key of a text in a manifest: 16 digits of its SHA-256."""
    return hashlib.sha256(text).hexdigest()[:16]


@lru_cache(maxsize=256)  # tasks are summed up at every evaluation
def xz_bytes(text: bytes) -> int:
    """Size of `xz -9e` of a text; about a second for each megabyte."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
