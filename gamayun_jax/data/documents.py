"""Documents, bad documents and damage, as all readers of input files give them."""

from __future__ import annotations

import functools
import itertools
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gamayun_jax.config import UserError

# Left out, but not a sign of broken input: these don't count for `max_bad_share`.
HARMLESS = ("empty", "too short", "held out")
MAX_DOCUMENT = 100_000_000  # bytes of a line or a text; more is a bad document
EXCERPT = 10_000  # characters of a rejected document that are kept


@dataclass(frozen=True)
class Document:
    """A text of an input file."""

    text: str
    file: str
    line: int  # from 1; for .parquet and tfds the number of the row
    id: str | None = None


@dataclass(frozen=True)
class BadDocument:
    """An entry of an input file that is no document, and why."""

    file: str
    line: int
    reason: str  # one of a few, for counting
    detail: str = ""
    excerpt: str = ""


@dataclass(frozen=True)
class Damage(BadDocument):
    """Part of an input file that could not be read; `line` is where it begins."""

    unread: int | None = None  # documents in it; None: nobody knows


@dataclass(frozen=True)
class Input:
    """One file (or tfds split) of a source: the unit of a scan job."""

    source: str
    text_field: str
    name: str  # as it is shown: relative to the folder all inputs of the source share
    kind: str  # jsonl | txt | parquet | tfds
    path: str
    files: tuple[str, ...]  # hashed for the recipe
    split: str = ""  # tfds only
    id_field: str = "id"


@functools.cache
def key_path(field: str) -> tuple[str, ...]:
    """The keys of a nested field such as "translation.ru" or "t/ru"."""
    return tuple(re.split("[./]", field))


def value_of(row: Mapping[str, Any], field: str) -> Any:
    """A row's field, nested if no key has its whole name; KeyError without one."""
    if field in row:
        return row[field]
    value: Any = row
    for key in key_path(field):
        if not isinstance(value, Mapping):
            raise KeyError(key)
        value = value[key]
    return value


def id_of(row: Mapping[str, Any], field: str) -> Any:
    """A row's id; None where it has none."""
    try:
        return value_of(row, field)
    except KeyError:
        return None


def no_field(field: str, row: Mapping[str, Any]) -> str:
    """That a field is missing, and which there are (nested ones by their path)."""
    names: list[str] = []
    for key, value in itertools.islice(row.items(), 20):
        inner = list(itertools.islice(value, 20)) if isinstance(value, Mapping) else []
        names += [f"{key}.{name}" for name in inner] or [str(key)]
    listed = ", ".join(names)[:300]
    # A key of JSON may have line ends and lone surrogates in it.
    listed = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in listed)
    return f"no field {field!r}; there are: {listed or 'none'}"


def as_document(
    item: Input, number: int, text: Any, id: Any = None
) -> Document | BadDocument:
    """Entry number `number` of a file, from the value of its text field."""

    def bad(reason: str, detail: str, excerpt: str = "") -> BadDocument:
        return BadDocument(item.name, number, reason, detail, excerpt)

    if text is None:
        return bad("no text", f"{item.text_field!r} is null")
    if not isinstance(text, bytes | str):
        # reprlib: whatever it is, short, and however deeply it is nested.
        return bad("text is not a string", type(text).__name__, reprlib.repr(text))
    if len(text) > MAX_DOCUMENT:
        unit = "bytes" if isinstance(text, bytes) else "characters"
        return bad("too long", f"{len(text)} {unit}")
    try:
        if isinstance(text, bytes):
            text = text.decode()
        else:
            text.encode()
    except UnicodeDecodeError as e:
        return bad("not UTF-8", str(e), excerpt(text))
    except UnicodeEncodeError as e:
        return bad("lone surrogates", str(e), ascii(text[:EXCERPT]))
    if isinstance(id, bytes):
        id = id.decode(errors="replace")
    elif not isinstance(id, str | None):
        id = str(id) if isinstance(id, int) else reprlib.repr(id)
    return Document(text, item.name, number, id)


def excerpt(raw: bytes) -> str:
    """The beginning of a line that is no document."""
    return raw[:EXCERPT].decode("utf-8", "backslashreplace")


def label(source: str) -> str:
    """How an error names a source; held-out files go by their field's own name."""
    return source if source.startswith("corpus.") else f"source {source}"


def no_access(item: Input, error: OSError) -> UserError:
    """The error for an input file that the system does not let us read."""
    return UserError(
        f"{label(item.source)}: {item.path} cannot be read: {error.strerror or error}"
    )
