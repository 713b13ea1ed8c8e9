"""Documents: reading them from files of several kinds, and cleaning their text."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from gamayun_jax.config import SourceConfig, UserError

# Left out, but not a sign of broken input: these don't count for `max_bad_share`.
HARMLESS = ("empty", "too short", "held out")
MAX_DOCUMENT = 100_000_000  # bytes of a line or a text; more is a bad document
EXCERPT = 10_000  # characters of a rejected document that are kept
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Document:
    text: str
    file: str
    line: int  # from 1; for .parquet and tfds the number of the row
    id: str | None = None


@dataclass(frozen=True)
class BadDocument:
    file: str
    line: int
    reason: str  # one of a few, for counting
    detail: str = ""
    excerpt: str = ""


@dataclass(frozen=True)
class Input:
    """One file (or tfds split) of a source: the unit of a scan job."""

    source: str
    text_field: str
    name: str  # as it is shown: relative to the folder all inputs of the source share
    kind: str  # jsonl | txt | parquet | tfds
    path: str
    files: tuple[str, ...]  # what is hashed
    split: str = ""  # tfds only


class UnreadableError(Exception):
    """The rest of an input file cannot be read: (reason, detail)."""


def read_documents(source: SourceConfig) -> Iterator[Document | BadDocument]:
    """All documents of a source, uncleaned, and what could not be read as one.

    Raises:
      UserError: a path or glob without files, an unknown kind of file, no permission.
    """
    for item in expand(source):
        yield from read_input(item)


def expand(source: SourceConfig) -> list[Input]:
    """The input files of a source, globs in sorted order, each file once."""
    at = f"source {source.name}"
    found: dict[str, str] = {}  # path -> kind
    inputs: list[Input] = []
    for pattern in source.files:
        if pattern.startswith("tfds:"):
            inputs.append(expand_tfds(source, pattern))
            continue
        paths = sorted(glob.glob(pattern, recursive=True))
        if os.path.exists(pattern):  # a name may hold glob characters
            paths = [pattern]
        if not paths:
            raise UserError(
                f"{at}: no file matches {pattern!r}: correct corpus.sources"
                f"[{source.name!r}].files"
            )
        for path in paths:
            match = re.search(r"\.(jsonl|txt|parquet)(\.gz|\.zst)?$", path)
            if not match or (match[1] == "parquet" and match[2]):
                raise UserError(
                    f"{at}: {path} is of no kind that is read: give .jsonl or .txt "
                    "(.gz and .zst too), .parquet, or tfds:FOLDER:SPLIT"
                )
            if not os.path.isfile(path):
                raise UserError(f"{at}: {path} is not a file: give {path}/*")
            found[path] = match[1]
    if not found and not inputs:
        raise UserError(f"{at} has no files: give at least one")
    if found:
        shared = os.path.commonpath(
            [os.path.dirname(os.path.abspath(p)) for p in found]
        )
        inputs += [
            Input(
                source.name,
                source.text_field,
                os.path.relpath(os.path.abspath(path), shared),
                kind,
                path,
                (path,),
            )
            for path, kind in found.items()
        ]
    return inputs


def expand_tfds(source: SourceConfig, pattern: str) -> Input:
    match = re.fullmatch(r"tfds:(.+):(\w+(?:\[[^\[\]]*\])?)", pattern)
    if not match:
        raise UserError(
            f"source {source.name}: {pattern!r} is not tfds:FOLDER:SPLIT "
            "(FOLDER is the one with dataset_info.json)"
        )
    folder, split = match.groups()
    try:
        info = open_tfds(folder).info
        shards = [str(p) for p in info.splits[split].filepaths]
        if info.file_format.value != "array_record":
            raise UserError(
                f"source {source.name}: {folder} is a data set in "
                f"{info.file_format.value} format: convert it to array_record "
                "(tfds convert_format)"
            )
    except (ValueError, KeyError, OSError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"source {source.name}: {pattern} cannot be opened: {first_line(e)}"
        ) from e
    described = [str(Path(folder, n)) for n in ("dataset_info.json", "features.json")]
    return Input(
        source.name,
        source.text_field,
        f"{Path(folder).name}:{split}",
        "tfds",
        folder,
        (*described, *shards),
        split,
    )


def open_tfds(folder: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_input(item: Input) -> Iterator[Document | BadDocument]:
    """The documents of one input file, in its order."""
    if item.kind in ("jsonl", "txt"):
        yield from read_lines(item)
        return
    number = 0
    rows = parquet_texts(item) if item.kind == "parquet" else tfds_texts(item)
    try:
        for text, id in rows:
            number += 1
            yield as_document(item, number, text, id)
    except UnreadableError as e:
        yield BadDocument(item.name, number + 1, *e.args)


def as_document(
    item: Input, number: int, text: Any, id: Any = None
) -> Document | BadDocument:
    if isinstance(text, bytes):
        if len(text) > MAX_DOCUMENT:
            return BadDocument(item.name, number, "too long", f"{len(text)} bytes")
        try:
            text = text.decode()
        except UnicodeDecodeError as e:
            return BadDocument(item.name, number, "not UTF-8", str(e), excerpt(text))
    if text is None:
        return BadDocument(
            item.name, number, "no text", f"no {item.text_field!r}, or null"
        )
    if not isinstance(text, str):
        kind = type(text).__name__
        return BadDocument(item.name, number, "text is not a string", kind, str(text))
    if len(text) > MAX_DOCUMENT:
        return BadDocument(item.name, number, "too long", f"{len(text)} characters")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return BadDocument(item.name, number, "lone surrogates", str(e), ascii(text))
    if isinstance(id, bytes):
        id = id.decode(errors="replace")
    return Document(text, item.name, number, None if id is None else str(id))


def excerpt(raw: bytes) -> str:
    return raw[:EXCERPT].decode("utf-8", "backslashreplace")


def read_lines(item: Input) -> Iterator[Document | BadDocument]:
    number = 0
    try:
        with open(item.path, "rb") as f:
            for number, line in lines(blocks(f, item.path)):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) > MAX_DOCUMENT:
                    why = f"more than {MAX_DOCUMENT} bytes in a line"
                    yield BadDocument(item.name, number, "too long", why, excerpt(line))
                elif line.strip():  # a blank line is no document
                    yield parse_line(item, number, line)
    except UnreadableError as e:
        yield BadDocument(item.name, number + 1, *e.args)
    except OSError as e:
        raise UserError(
            f"source {item.source}: {item.path} cannot be read: {e.strerror or e}"
        ) from e


def parse_line(item: Input, number: int, line: bytes) -> Document | BadDocument:
    def bad(reason: str, detail: str = "") -> BadDocument:
        return BadDocument(item.name, number, reason, detail, excerpt(line))

    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        return bad("not UTF-8", str(e))
    if item.kind == "txt":
        return Document(text, item.name, number)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        return bad("not JSON", str(e))
    if not isinstance(data, dict):
        return bad("not a JSON object")
    if item.text_field not in data:
        return bad("no text", f"no field {item.text_field!r}")
    return as_document(item, number, data[item.text_field], data.get("id"))


def blocks(f: BinaryIO, path: str) -> Iterator[bytes]:
    """Decompressed blocks of bounded size; UnreadableError where they end early."""
    if not path.endswith((".gz", ".zst")):
        while block := f.read(1 << 20):
            yield block
        return
    try:
        if os.fstat(f.fileno()).st_size == 0:
            raise UnreadableError("truncated file", "a compressed file of 0 bytes")
        if path.endswith(".gz"):
            with gzip.GzipFile(fileobj=f) as unzipped:
                while block := unzipped.read1(1 << 20):
                    yield block
            return
        # Not stream_reader, which takes a truncated file for a complete one. 4 KiB
        # can stand for 128 MiB at most.
        make = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        frame, started = make(), False
        while raw := f.read(4096):
            while raw:
                started = True
                yield frame.decompress(raw)
                if not frame.eof:
                    break
                raw, frame, started = frame.unused_data, make(), False
        if started:
            raise UnreadableError("truncated file", "the last zstd frame is incomplete")
    except EOFError as e:
        raise UnreadableError("truncated file", first_line(e)) from e
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
        raise UnreadableError("corrupt file", first_line(e)) from e


def lines(parts: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, line without its end). Of a line too long only a beginning is held."""
    held: list[bytes] = []
    number, size = 1, 0
    for block in parts:
        *ended, rest = block.split(b"\n")
        for part in ended:
            line = b"".join((*held, part)) if held else part
            yield number, line.removesuffix(b"\r")
            number, held, size = number + 1, [], 0
        if size <= MAX_DOCUMENT:
            held.append(rest)
            size += len(rest)
    if size:
        yield number, b"".join(held).removesuffix(b"\r")


def parquet_texts(item: Input) -> Iterator[tuple[Any, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(item.path) as f:
            names = f.schema_arrow.names
            if item.text_field not in names:
                # As many bad documents as it has rows.
                for _ in range(f.metadata.num_rows):
                    yield None, None
                return
            columns = [item.text_field, *(["id"] if "id" in names else [])]
            for batch in f.iter_batches(256, columns=columns):
                texts = batch.column(item.text_field).to_pylist()
                ids = batch.column("id").to_pylist() if "id" in names else texts
                for text, id in zip(texts, ids, strict=True):
                    yield text, (id if "id" in names else None)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise UnreadableError("corrupt file", first_line(e)) from e


def tfds_texts(item: Input) -> Iterator[tuple[Any, Any]]:
    try:
        rows = open_tfds(item.path).as_data_source(item.split)
        for i in range(len(rows)):
            row = rows[i]
            yield row.get(item.text_field), row.get("id")
    except (ValueError, KeyError, OSError, RuntimeError, IndexError) as e:
        raise UnreadableError("corrupt file", first_line(e)) from e


# Control characters but tab and newline; soft hyphen, zero-width space, BOM. The
# joiners U+200C and U+200D stay: words and emoji are spelled with them.
DROPPED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\ufeff]")
TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)


def clean(text: str) -> str:
    """NFC, \\n line ends, no control or invisible characters, no trailing spaces."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", DROPPED.sub("", text))
    return TRAILING.sub("", text).strip("\n")


def digest(text: bytes) -> bytes:
    """16 bytes; no text of a corpus collides with another in this world's lifetime."""
    return hashlib.blake2b(text, digest_size=16).digest()
