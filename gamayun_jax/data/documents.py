"""Documents: reading them from files of several kinds, and cleaning their text."""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import reprlib
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import zstandard

from gamayun_jax.config import SourceConfig, UserError

# Left out, but not a sign of broken input: these don't count for `max_bad_share`.
HARMLESS = ("empty", "too short", "held out")
MAX_DOCUMENT = 100_000_000  # bytes of a line or a text; more is a bad document
CLEANING = 2  # version of the rules of `clean`: part of a corpus's recipe
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
    at = label(source.name)
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
                f"{at}: no file matches {pattern!r}: correct "
                + (
                    at
                    if at == source.name
                    else f"corpus.sources[{source.name!r}].files"
                )
            )
        for path in paths:
            match = re.search(r"\.(jsonl|json|ndjson|txt|parquet)(\.gz|\.zst)?$", path)
            if not match or (match[1] == "parquet" and match[2]):
                raise UserError(
                    f"{at}: {path} is of no kind that is read: give .jsonl, .json or "
                    ".ndjson (an object a line), .txt (all of them .gz and .zst too), "
                    ".parquet, or tfds:FOLDER:SPLIT"
                )
            if not os.path.isfile(path):
                raise UserError(f"{at}: {path} is not a file: give {path}/*")
            if re.search("[\ud800-\udfff]", path):  # the manifest lists it
                raise UserError(f"{at}: the name of {path!a} is not UTF-8: rename it")
            found[path] = match[1] if match[1] in ("txt", "parquet") else "jsonl"
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


def label(source: str) -> str:
    """How an error names a source; held-out files go by their field's own name."""
    return source if source.startswith("corpus.") else f"source {source}"


def expand_tfds(source: SourceConfig, pattern: str) -> Input:
    match = re.fullmatch(r"tfds:(.+):(\w+(?:\[[^\[\]]*\])?)", pattern)
    if not match:
        raise UserError(
            f"{label(source.name)}: {pattern!r} is not tfds:FOLDER:SPLIT "
            "(FOLDER is the one with dataset_info.json)"
        )
    folder, split = match.groups()
    try:
        info = open_tfds(folder).info
        shards = [str(p) for p in info.splits[split].filepaths]
        if info.file_format.value != "array_record":
            raise UserError(
                f"{label(source.name)}: {folder} is a data set in "
                f"{info.file_format.value} format: convert it to array_record "
                "(tfds convert_format)"
            )
    except (ValueError, KeyError, OSError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{label(source.name)}: {pattern} cannot be opened: {first_line(e)}"
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
    """The documents of one input file, in its order.

    What of a damaged file cannot be read is one `Damage`, after all that can be.
    """
    if item.kind == "parquet":
        return read_parquet(item)
    return read_tfds(item) if item.kind == "tfds" else read_lines(item)


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
    if isinstance(text, bytes):
        if len(text) > MAX_DOCUMENT:
            return BadDocument(item.name, number, "too long", f"{len(text)} bytes")
        try:
            text = text.decode()
        except UnicodeDecodeError as e:
            return BadDocument(item.name, number, "not UTF-8", str(e), excerpt(text))
    elif isinstance(text, str):
        if len(text) > MAX_DOCUMENT:
            why = f"{len(text)} characters"
            return BadDocument(item.name, number, "too long", why)
        try:
            text.encode()
        except UnicodeEncodeError as e:
            return BadDocument(
                item.name, number, "lone surrogates", str(e), ascii(text[:EXCERPT])
            )
    elif text is None:
        return BadDocument(item.name, number, "no text", f"{item.text_field!r} is null")
    else:
        # reprlib: whatever it is, short, and however deeply it is nested.
        kind, shown = type(text).__name__, reprlib.repr(text)
        return BadDocument(item.name, number, "text is not a string", kind, shown)
    if isinstance(id, bytes):
        id = id.decode(errors="replace")
    elif not isinstance(id, str | None):
        id = str(id) if isinstance(id, int) else reprlib.repr(id)
    return Document(text, item.name, number, id)


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
        yield Damage(item.name, number + 1, *e.args)
    except OSError as e:
        raise no_access(item, e) from e


def no_access(item: Input, error: OSError) -> UserError:
    return UserError(
        f"{label(item.source)}: {item.path} cannot be read: {error.strerror or error}"
    )


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
    try:
        return as_document(
            item, number, value_of(data, item.text_field), data.get("id")
        )
    except KeyError:
        return bad("no text", no_field(item.text_field, data))


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
        if size <= MAX_DOCUMENT:
            held.append(rest)
            size += len(rest)
    if size:
        yield number, b"".join(held).removesuffix(b"\r")


def read_parquet(item: Input) -> Iterator[Document | BadDocument]:
    """Rows group by group: where one is damaged, the groups after it are read."""
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError, ValueError)
    try:
        with open(item.path, "rb") as f:
            f.read(1)
        file = pyarrow.parquet.ParquetFile(item.path)
    except broken as e:
        if isinstance(e, OSError) and e.errno:
            raise no_access(item, e) from e
        yield Damage(item.name, 1, "corrupt file", first_line(e))
        return
    number, lost, damage = 0, 0, None
    with file:
        schema = file.schema_arrow
        names, path = list(schema.names), key_path(item.text_field)
        if item.text_field in names:
            path = (item.text_field,)
        if names.count(path[0]) > 1:
            raise UserError(
                f"{label(item.source)}: {item.path} has {names.count(path[0])} columns "
                f"named {path[0]!r}: rename one of them"
            )
        if not has_path(schema, path):
            columns = {f.name: dict.fromkeys(fields_of(f.type)) for f in schema}
            why = no_field(item.text_field, columns)
            for number in range(1, file.metadata.num_rows + 1):  # so many bad documents
                yield BadDocument(item.name, number, "no text", why)
            return
        wanted = [".".join(path), *(["id"] if names.count("id") == 1 else [])]
        for group in range(file.num_row_groups):
            begin = number
            end = begin + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(256, [group], wanted):
                    texts = column_values(batch.column(path[0]), path[1:])
                    ids: Iterable[Any] = itertools.repeat(None)
                    if len(wanted) > 1:
                        ids = column_values(batch.column("id"))
                    for text, id in zip(texts, ids, strict=False):
                        number += 1
                        yield as_document(item, number, text, id)
                why = "fewer rows than the file says"
            except broken as e:
                if isinstance(e, OSError) and e.errno:  # it may be whole
                    raise no_access(item, e) from e
                why = first_line(e)
            if number < end:
                damage = damage or (number + 1, "corrupt file", why)
                lost += end - number
                number = end
    if damage:
        yield Damage(item.name, *damage, unread=lost)


def fields_of(kind: Any) -> list[str]:
    """Names inside a column's type; none if it is not a struct."""
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return []
    return [kind.field(i).name for i in range(kind.num_fields)]


def has_path(schema: Any, path: tuple[str, ...]) -> bool:
    if path[0] not in schema.names:
        return False
    kind = schema.field(path[0]).type
    for name in path[1:]:
        if fields_of(kind).count(name) != 1:
            return False
        kind = kind.field(name).type
    return True


def column_values(column: Any, path: tuple[str, ...] = ()) -> list[Any]:
    """A column's values, or those of a field inside of it; strings as their bytes.

    So a string that is not UTF-8 is a fault of its own row alone.
    """
    import pyarrow
    import pyarrow.compute

    if path:
        column = pyarrow.compute.struct_field(column, list(path))
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.binary())
    elif types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        return [scalar_value(scalar) for scalar in column]


def scalar_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None  # a date, say, that Python has no value for


def read_tfds(item: Input) -> Iterator[Document | BadDocument]:
    """Rows shard by shard, since a data source keeps each shard open that it read."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from google.protobuf.message import DecodeError

    broken = (ValueError, KeyError, OSError, RuntimeError, IndexError, DecodeError)
    try:
        info = open_tfds(item.path).info
        shards = info.splits[item.split].file_instructions
    except broken as e:
        yield Damage(item.name, 1, "corrupt file", first_line(e))
        return
    number, lost, damage = 0, 0, None
    for shard in shards:
        records = ArrayRecordDataSource([shard])  # the one before is let go
        for i in range(shard.take):
            number += 1
            try:
                row = info.features.deserialize_example_np(records[i])
            except broken as e:
                damage = damage or (number, "corrupt file", first_line(e))
                lost += 1
                continue
            try:
                text = value_of(row, item.text_field)
            except KeyError:
                why = no_field(item.text_field, row)
                yield BadDocument(item.name, number, "no text", why)
                continue
            yield as_document(item, number, text, row.get("id"))
    if damage:
        yield Damage(item.name, *damage, unread=lost)


# All that ends a line or a paragraph in Unicode (annex 14) or separates records.
LINE_BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# Control characters but tab and newline; soft hyphen, BOM. The joiners U+200C and
# U+200D stay: words and emoji are spelled with them.
DROPPED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u2028\u2029\ufeff]")
REPLACED = {**dict.fromkeys(LINE_BREAKS, "\n"), "\x1f": " "}
# The zero-width space stays beside letters of scripts that mark words with it (Thai,
# Lao, Burmese, Khmer, Tai); elsewhere it only allows a line to break within a word.
WORDS_BY_MARKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"
WORDS_BY_MARKS += "\ua9e0-\ua9ff\uaa60-\uaadf"
ZERO_WIDTH = re.compile(f"(?<![{WORDS_BY_MARKS}])\u200b(?![{WORDS_BY_MARKS}])")
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
# Runs in which marks may be; two of kana are letters, and marks when decomposed.
MARKS = re.compile(r"(?:[^\w\x00-\x7f]|[\uff9e\uff9f]){32,}")


def normal_form(form: Form, text: str) -> str:
    """unicodedata.normalize, in a time that does not grow as the square.

    It sorts a run of combining marks by insertion: half a million take a quarter of
    an hour. So long runs are sorted before, in the same (stable) order.
    """
    if unicodedata.is_normalized(form, text):
        return text

    def sort(run: re.Match[str]) -> str:
        apart: Form = "NFD" if form in ("NFC", "NFD") else "NFKD"
        marks = "".join(unicodedata.normalize(apart, c) for c in run[0])
        groups = itertools.groupby(marks, lambda c: unicodedata.combining(c) > 0)
        return "".join(
            "".join(sorted(found, key=unicodedata.combining) if is_mark else found)
            for is_mark, found in groups
        )

    return unicodedata.normalize(form, MARKS.sub(sort, text))


def clean(text: str) -> str:
    """NFC, \\n line ends, no control or invisible characters, no trailing spaces."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = DROPPED.sub(lambda found: REPLACED.get(found[0], ""), text)
    text = normal_form("NFC", text)
    if "\u200b" in text:
        text = normal_form("NFC", ZERO_WIDTH.sub("", text))
    if " \n" in text or "\t\n" in text:
        text = "\n".join([line.rstrip(" \t") for line in text.split("\n")])
    return text.rstrip(" \t\n").lstrip("\n")


def digest(text: bytes) -> bytes:
    """16 bytes; no text of a corpus collides with another in this world's lifetime."""
    return hashlib.blake2b(text, digest_size=16).digest()
