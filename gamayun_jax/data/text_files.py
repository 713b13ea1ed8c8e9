"""Documents in JSON Lines and plain text, compressed or not: one on each line."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import zstandard

from gamayun_jax.data import documents
from gamayun_jax.data.documents import (
    BadDocument,
    Damage,
    Document,
    Input,
    as_document,
    excerpt,
    id_of,
    no_access,
    no_field,
    value_of,
)
from gamayun_jax.data.files import first_line


class UnreadableError(Exception):
    """The rest of an input file cannot be read: (reason, detail)."""


def read_lines(item: Input) -> Iterator[Document | BadDocument]:
    """The documents of a file of lines; `Damage` where it cannot be read further."""
    number = 0
    try:
        with open(item.path, "rb") as f:
            for number, line in lines(blocks(f, item.path)):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) > documents.MAX_DOCUMENT:
                    why = f"more than {documents.MAX_DOCUMENT} bytes in a line"
                    yield BadDocument(item.name, number, "too long", why, excerpt(line))
                elif line.strip():  # a blank line is no document
                    yield parse_line(item, number, line)
    except UnreadableError as e:
        yield Damage(item.name, number + 1, *e.args)
    except OSError as e:
        raise no_access(item, e) from e


def parse_line(item: Input, number: int, line: bytes) -> Document | BadDocument:
    def bad(reason: str, detail: str = "") -> BadDocument:
        return BadDocument(item.name, number, reason, detail, excerpt(line))

    if item.kind == "txt":
        return as_document(item, number, line)
    try:
        data = json.loads(line.decode())
    except UnicodeDecodeError as e:
        return bad("not UTF-8", str(e))
    except (ValueError, RecursionError) as e:
        return bad("not JSON", str(e))
    if not isinstance(data, dict):
        return bad("not a JSON object")
    try:
        text = value_of(data, item.text_field)
    except KeyError:
        return bad("no text", no_field(item.text_field, data))
    return as_document(item, number, text, id_of(data, item.id_field))


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
        size = os.fstat(f.fileno()).st_size
        where = f"{first_line(e)}, near byte {f.tell():,} of {size:,}"
        raise UnreadableError("corrupt file", where) from e


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
        if size <= documents.MAX_DOCUMENT:
            held.append(rest)
            size += len(rest)
    if size:
        yield number, b"".join(held).removesuffix(b"\r")
