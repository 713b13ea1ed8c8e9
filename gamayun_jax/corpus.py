"""Documents to a tokenised corpus: cleaned, deduplicated, sharded ArrayRecord.

A corpus folder:

  manifest.json                      what it holds; written last
  tokenizer.model
  sources/<lang>/<domain>/00000.arrayrecord ...
  sources/<lang>/<domain>/token_counts.npy        int64[V], counts of each token
  heldout/<set>.<lang>.jsonl                      {"id", "text"}
  rejected/<lang>.<domain>.jsonl                  what was left out, and why

A document's tokens are [BOS, ..., EOS]. The documents of a shard make one stream,
cut into records of `record_tokens + 1` tokens with stride `record_tokens`: a
record's last token comes again as the next one's first, so that every token but a
shard's first is the target once. The tail is padded. Tokens are little-endian uint16,
or uint32 if the vocabulary has more than 65,536 pieces.

A build goes through three steps, each in parallel and each restartable: `scan` (one
job per input file: read, clean, digest; the text goes to compressed chunks in
<out>/.work), then the duplicates are found, then `tokenise` (one job per shard).
Jobs depend on the input alone, so the bytes of a corpus depend neither on the number
of workers nor on interruptions.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from gamayun_jax import tokenizer as tok
from gamayun_jax.config import Config, CorpusConfig, SourceConfig, UserError
from gamayun_jax.tokenizer import Tokenizer

FORMAT = 1
WRITER_OPTIONS = "group_size:1,uncompressed"
MAX_DOCUMENT = 100_000_000  # bytes of a line or a text; more is a bad document
EXCERPT = 10_000  # characters of a rejected document that are kept
BATCH_BYTES = 1_000_000  # text given to the tokenizer at a time
# Left out, but not a sign of broken input: these don't count for `max_bad_share`.
HARMLESS = ("empty", "too short", "held out")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
Heldout = dict[str, dict[str, list[tuple[str, str]]]]  # set -> language -> (id, text)


# ------------------------------------------------------------------ reading


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


# ------------------------------------------------------------------ files


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, durably, if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, data: Any) -> None:
    with atomic(path) as temporary:
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, "utf-8")


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One build per folder at a time; the lock goes with the process."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(
                f"corpus {folder} is being built by another process: wait for it"
            ) from e
        yield
    finally:
        os.close(fd)


# ------------------------------------------------------------------ workers


def start_worker() -> None:
    # No worker outlives its parent: one that is killed can't tell them to end.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Pool:
    """Runs jobs in spawned processes (never forked: JAX has threads), or right here."""

    def __init__(self, workers: int):
        self.workers = workers
        self.executor: ProcessPoolExecutor | None = None
        self.others = set(multiprocessing.active_children())

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.executor is None:
            return
        if kind is not None:
            for child in set(multiprocessing.active_children()) - self.others:
                child.terminate()
        self.executor.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """(number of the job, its result) as they are done."""
        if self.workers <= 1:
            for i, job in enumerate(jobs):
                yield i, function(*job)
            return
        if not jobs:
            return
        if self.executor is None:
            self.executor = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=start_worker,
            )
        try:
            # Ctrl-C is this process's to handle: those it starts inherit the mask.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures: dict[Future, int] = {
                    self.executor.submit(function, *job): i
                    for i, job in enumerate(jobs)
                }
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as e:
            raise UserError(
                "a worker process of the build died (out of memory?): run again with "
                "fewer workers, finished shards are kept; in a script of your own, "
                'call build under `if __name__ == "__main__":`'
            ) from e


# ------------------------------------------------------------------ step 1: scan


def scan(item: Input, out: Path, min_chars: int, shard_bytes: int) -> dict[str, Any]:
    """Read and clean one input file into the folder `out`; returns its counts.

    docs.npz: digest S16[N], bytes, characters, chunk int64[N] of the clean documents;
    <chunk>.zst: their UTF-8 texts, one after the other; rejected.jsonl; done.json.
    """
    if (out / "done.json").exists():
        return json.loads((out / "done.json").read_text("utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="scan-", dir=out.parent))
    digests: list[bytes] = []
    sizes: list[tuple[int, int, int]] = []
    reasons: Counter[str] = Counter()
    first_bad = ""
    read, chunk, filled = 0, -1, 0
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(
            open(work / "rejected.jsonl", "w", encoding="utf-8")
        )
        chunk_file: Any = None
        for found in read_input(item):
            read += 1
            if isinstance(found, Document):
                text = clean(found.text)
                if len(text) < max(min_chars, 1):
                    reason = "too short" if text else "empty"
                    found = BadDocument(
                        found.file, found.line, reason, "", found.text[:EXCERPT]
                    )
            if isinstance(found, BadDocument):
                reasons[found.reason] += 1
                if not first_bad and found.reason not in HARMLESS:
                    detail = f" ({found.detail})" if found.detail else ""
                    first_bad = f"{found.file}:{found.line}: {found.reason}{detail}"
                row = {
                    "file": found.file,
                    "line": found.line,
                    "reason": found.reason,
                    "detail": found.detail,
                    "text": found.excerpt[:EXCERPT],
                }
                # A rejected text may hold lone surrogates: escape what isn't ASCII.
                rejected.write(json.dumps(row) + "\n")
                continue
            encoded = text.encode()
            if chunk < 0 or (filled and filled + len(encoded) > shard_bytes):
                if chunk_file:
                    chunk_file.close()
                chunk, filled = chunk + 1, 0
                chunk_file = zstandard.open(
                    work / f"{chunk}.zst", "wb", cctx=zstandard.ZstdCompressor(level=1)
                )
            chunk_file.write(encoded)
            filled += len(encoded)
            digests.append(digest(encoded))
            sizes.append((len(encoded), len(text), chunk))
        if chunk_file:
            chunk_file.close()
    table = np.array(sizes, np.int64).reshape(-1, 3)
    np.savez(
        work / "docs.npz",
        digest=np.array(digests, "S16"),
        bytes=table[:, 0],
        characters=table[:, 1],
        chunk=table[:, 2],
    )
    done = {"read": read, "rejected": dict(sorted(reasons.items())), "bad": first_bad}
    for file in work.iterdir():
        sync(file)
    write_json(work / "done.json", done)
    try:
        os.rename(work, out)  # fails if an orphan of a killed build was faster
    except OSError:
        shutil.rmtree(work)
    sync(out.parent)
    return done


def chunk_texts(folder: Path, chunk: int, keep: np.ndarray) -> Iterator[bytes]:
    """The documents of one chunk of a scan for which `keep` (bool[n]) is set."""
    with np.load(folder / "docs.npz") as docs:
        sizes = docs["bytes"][docs["chunk"] == chunk]
    with zstandard.open(folder / f"{chunk}.zst", "rb") as f:
        buffered = io.BufferedReader(f, 1 << 20)  # type: ignore[type-var, arg-type]
        for size, kept in zip(sizes.tolist(), keep.tolist(), strict=True):
            text = buffered.read(size)
            assert len(text) == size, f"{folder}/{chunk}.zst is cut short"
            if kept:
                yield text


# ------------------------------------------------------------------ duplicates


@dataclass
class Scanned:
    """A scanned input file, and which of its documents stay."""

    source: str
    folder: Path
    digest: np.ndarray  # S16[N]
    bytes: np.ndarray  # int64[N]
    characters: np.ndarray  # int64[N]
    chunk: np.ndarray  # int64[N]
    keep: np.ndarray  # bool[N]
    duplicates: int = 0
    held_out: int = 0


def select(scanned: Sequence[tuple[str, Path]], heldout: Heldout) -> list[Scanned]:
    """Keep the first of equal documents over the whole corpus, and none held out."""
    files = []
    for source, folder in scanned:
        with np.load(folder / "docs.npz") as docs:
            columns = {k: docs[k] for k in ("digest", "bytes", "characters", "chunk")}
        keep = np.ones(len(columns["bytes"]), bool)
        files.append(Scanned(source, folder, **columns, keep=keep))
    units = [u for languages in heldout.values() for u in languages.values()]
    held = np.array([digest(t.encode()) for unit in units for _, t in unit], "S16")
    digests = np.concatenate([held, *(f.digest for f in files)])
    # The index of the first document that is equal to each one.
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    first = first[inverse]
    begin = len(held)
    for file in files:
        end = begin + len(file.keep)
        of_file = first[begin:end]
        file.keep = of_file == np.arange(begin, end)
        file.held_out = int(np.sum(of_file < len(held)))
        file.duplicates = int(len(file.keep) - file.keep.sum()) - file.held_out
        begin = end
    return files


def sample_texts(files: Sequence[Scanned], budget: int) -> Iterator[str]:
    """About `budget` bytes of these files' documents, evenly from all of them."""
    total = sum(int(f.bytes[f.keep].sum()) for f in files)
    share = min(1.0, budget / max(total, 1))
    for file in files:
        # The digest decides, so the sample is spread evenly and always the same.
        heads = np.frombuffer(file.digest.astype("S16").tobytes(), ">u8")[::2]
        keep = file.keep & (heads.astype(np.float64) <= share * 2.0**64)
        for chunk in range(int(file.chunk.max(initial=-1)) + 1):
            for text in chunk_texts(file.folder, chunk, keep[file.chunk == chunk]):
                yield text.decode()


def fit_tokenizer(cfg: CorpusConfig, files: Sequence[Scanned], out: Path) -> None:
    """Train the corpus's tokenizer on its kept documents (a job of the pool)."""
    of_language: dict[str, list[Scanned]] = {}
    for file in files:
        of_language.setdefault(file.source.split("/")[0], []).append(file)
    shares = tok.shares_of(cfg.tokenizer, list(of_language))
    texts = {
        language: sample_texts(
            found, int(shares[language] * cfg.tokenizer.sample_bytes)
        )
        for language, found in of_language.items()
    }
    tok.train(texts, cfg.tokenizer, out)


# ------------------------------------------------------------------ step 2: tokenise

Part = tuple[Path, int, np.ndarray]  # folder of a scan, chunk, keep bool[n]


def plan_shards(
    files: Sequence[Scanned], shard_bytes: int
) -> dict[str, list[list[Part]]]:
    """Source -> shards -> consecutive chunks of it, about `shard_bytes` together."""
    plan: dict[str, list[list[Part]]] = {}
    filled = 0
    for file in files:
        shards = plan.setdefault(file.source, [])
        for chunk in range(int(file.chunk.max(initial=-1)) + 1):
            inside = file.chunk == chunk
            size = int(file.bytes[inside & file.keep].sum())
            if not size:
                continue
            if not shards or filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((file.folder, chunk, file.keep[inside]))
            filled += size
    return plan


def tokenise(
    model: Path, parts: Sequence[Part], record_tokens: int, shard: Path, marker: Path
) -> dict[str, Any]:
    """Write one shard, then its token counts (<marker>.npy), then `marker` (JSON)."""
    if marker.exists() and shard.exists():
        return json.loads(marker.read_text("utf-8"))
    tokenizer = Tokenizer(model)
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    info = {"documents": 0, "characters": 0, "bytes": 0, "tokens": 0, "records": 0}
    stream = np.empty(0, dtype)  # tokens that are not all written yet
    with atomic(shard) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            for texts in batched(t for part in parts for t in chunk_texts(*part)):
                tokens: list[int] = []
                for ids in tokenizer.encode_batch(texts):
                    tokens.append(tokenizer.bos_id)
                    tokens += ids
                    tokens.append(tokenizer.eos_id)
                new = np.array(tokens, dtype)
                counts += np.bincount(new, minlength=len(counts))
                info["documents"] += len(texts)
                info["characters"] += sum(map(len, texts))
                info["bytes"] += sum(len(t.encode()) for t in texts)
                info["tokens"] += len(new)
                stream = np.concatenate([stream, new])
                whole = max(len(stream) - 1, 0) // record_tokens
                for i in range(whole):
                    begin = i * record_tokens
                    writer.write(stream[begin : begin + record_tokens + 1].tobytes())
                info["records"] += whole
                stream = stream[whole * record_tokens :]
            if len(stream) > 1:  # a single token is the last record's last
                missing = record_tokens + 1 - len(stream)
                padding = np.full(missing, tokenizer.pad_id, dtype)
                writer.write(np.concatenate([stream, padding]).tobytes())
                info["records"] += 1
        finally:
            writer.close()
        check_shard(temporary, info["records"])  # the writer is silent on a full disk
    assert counts.sum() == info["tokens"]
    assert info["records"] == -(-(info["tokens"] - 1) // record_tokens)
    with atomic(marker.with_suffix(".npy")) as temporary, open(temporary, "wb") as f:
        np.save(f, counts)
    done = {**info, "sha256": file_sha256(shard)}
    write_json(marker, done)
    return done


def batched(texts: Iterable[bytes]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text.decode())
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65_536 else "<u4"


# ------------------------------------------------------------------ build


def check_recipe(cfg: Config) -> None:
    """Raise UserError for what a corpus config's field types cannot say."""
    corpus = cfg.corpus
    names = [s.name for s in corpus.sources]
    if not names:
        raise UserError("corpus.sources is empty: a corpus needs at least one source")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"corpus.sources has {twice!r} twice: give all files in one")
    for name in names:
        parts = name.split("/")
        if len(parts) != 2 or not all(NAME.fullmatch(p) for p in parts):
            raise UserError(
                f"corpus.sources: {name!r} is not <language>/<domain> in letters, "
                "digits, - and _"
            )
    heldout = {h.name: h for h in corpus.heldout}
    if len(heldout) < len(corpus.heldout):
        raise UserError(
            "corpus.heldout: two sets have the same name; give each its own"
        )
    for name in heldout:
        if not NAME.fullmatch(name):
            raise UserError(f"corpus.heldout: {name!r} is not letters, digits, - and _")
    used = {n.split("/")[0] for n in names}
    for language in sorted(used | {k for h in corpus.heldout for k in h.files}):
        if language not in cfg.languages:
            raise UserError(
                f"corpus has language {language!r}, which is not in languages "
                f"({', '.join(cfg.languages)}): add it there"
            )
    for field in ("record_tokens", "shard_bytes"):
        if getattr(corpus, field) < 1:
            raise UserError(f"corpus.{field}={getattr(corpus, field)}: give 1 or more")
    if not 0 <= corpus.max_bad_share <= 1:
        raise UserError(
            f"corpus.max_bad_share={corpus.max_bad_share}: give a share from 0 to 1"
        )
    if corpus.record_tokens % cfg.data.seq_len:
        raise UserError(
            f"corpus.record_tokens={corpus.record_tokens} is not a multiple of "
            f"data.seq_len={cfg.data.seq_len}: make it one"
        )


def read_heldout(cfg: CorpusConfig) -> Heldout:
    """Set -> language -> (id, cleaned text) in the order given.

    Raises:
      UserError: any unit that cannot be read, or parallel files that do not match.
    """
    sets: Heldout = {}
    for spec in cfg.heldout:
        found: dict[str, list[tuple[str, str]]] = {}
        for language, file in spec.files.items():
            at = f"held-out set {spec.name!r}, language {language}: {file}"
            units = found.setdefault(language, [])
            for unit in read_documents(SourceConfig(f"{language}/heldout", (file,))):
                if isinstance(unit, BadDocument):
                    raise UserError(
                        f"{at}:{unit.line}: {unit.reason} {unit.detail}".rstrip()
                    )
                text = clean(unit.text)
                if not text:
                    raise UserError(f"{at}:{unit.line} has no text: take the unit out")
                units.append((str(len(units)) if unit.id is None else unit.id, text))
            if not units:
                raise UserError(f"{at} is empty: take it out of corpus.heldout")
        if not found:
            raise UserError(f"held-out set {spec.name!r} has no files: give some")
        sets[spec.name] = found
        (first, units), *others = found.items()
        for language, those in others if spec.parallel else ():
            ids, their_ids = [i for i, _ in units], [i for i, _ in those]
            if ids == their_ids:
                continue
            at = f"held-out set {spec.name!r} is parallel, but {language}"
            if len(ids) != len(their_ids):
                raise UserError(
                    f"{at} has {len(their_ids)} units and {first} {len(ids)}: give the "
                    "same units in the same order, or set parallel=False"
                )
            k = next(k for k in range(len(ids)) if ids[k] != their_ids[k])
            raise UserError(
                f"{at} has id {their_ids[k]!r} at unit {k + 1}, where {first} has "
                f"{ids[k]!r}: order them alike, or set parallel=False"
            )
    return sets


def check_model(cfg: CorpusConfig) -> None:
    """Raise UserError if a ready tokenizer is not one that the config describes."""
    if not cfg.tokenizer.model:
        return
    size = Tokenizer(cfg.tokenizer.model).vocab_size
    if size != cfg.tokenizer.vocab_size:
        raise UserError(
            f"tokenizer {cfg.tokenizer.model} has {size} pieces, but "
            f"corpus.tokenizer.vocab_size={cfg.tokenizer.vocab_size}: set it to that"
        )


def describe_inputs(files: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """What the recipe and the manifest say of each (name, path)."""

    def describe(file: tuple[str, str]) -> dict[str, Any]:
        name, path = file
        try:
            size, sha = os.path.getsize(path), file_sha256(path)
        except OSError as e:
            raise UserError(f"input {path} cannot be read: {e.strerror or e}") from e
        return {"file": name, "sha256": sha, "bytes": size}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(describe, files))


def recipe_of(
    cfg: Config, inputs: Sequence[Input]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that decides the bytes of the corpus, and the description of its inputs.

    Names of folders are not part of it: a copied corpus is the same corpus. Neither
    is `max_bad_share`: it decides if there is a corpus, not which.
    """
    files: list[tuple[str, str]] = []
    for item in inputs:
        for path in item.files:
            single = item.kind != "tfds"
            files.append(
                (item.name if single else f"{item.name}/{Path(path).name}", path)
            )
    ends = [len(files)]
    for spec in cfg.corpus.heldout:
        files += [(Path(path).name, path) for path in spec.files.values()]
    ends.append(len(files))
    model = cfg.corpus.tokenizer.model
    if model:
        files.append((Path(model).name, model))
    described = describe_inputs(files)
    corpus = cfg.corpus
    recipe = {
        "format": FORMAT,
        "languages": list(cfg.languages),
        "sources": [
            [i.source, i.text_field, i.kind, i.split, i.name, len(i.files)]
            for i in inputs
        ],
        "heldout": [[h.name, h.parallel, list(h.files)] for h in corpus.heldout],
        "tokenizer": [
            corpus.tokenizer.vocab_size,
            None if model else sorted(corpus.tokenizer.shares.items()),
            None if model else corpus.tokenizer.sample_bytes,
        ],
        "record_tokens": corpus.record_tokens,
        "shard_bytes": corpus.shard_bytes,
        "min_chars": corpus.min_chars,
        "inputs": described,
    }
    return recipe, described


def build(
    cfg: Config, out: Path, workers: int | None = None, progress: bool = True
) -> Corpus:
    """Build the corpus of `cfg.corpus` in the folder `out`, or go on with it.

    Kill it at any time and run it again: finished work is kept and the result is the
    same. `workers` is the number of processes (default: the cores of this machine).
    Progress and what was left out go to stderr.

    Raises:
      UserError: bad config or input, a folder that holds another corpus, a full disk.
    """
    out = Path(out)
    check_recipe(cfg)
    inputs = [item for source in cfg.corpus.sources for item in expand(source)]
    heldout = read_heldout(cfg.corpus)
    check_model(cfg.corpus)
    recipe, described = recipe_of(cfg, inputs)
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out):
            if not find_former(out, fingerprint):
                with Pool(workers) as pool:
                    manifest = make(cfg, out, inputs, heldout, pool, progress)
                manifest |= {"recipe": fingerprint, "inputs": described}
                write_json(out / "manifest.json", manifest)
            shutil.rmtree(out / ".work", ignore_errors=True)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(
            f"corpus {out} cannot be written: {e.strerror or e}{where}; what is "
            "finished is kept, run it again"
        ) from e
    return open_corpus(out)


def find_former(out: Path, fingerprint: str) -> bool:
    """True if the corpus is there already; else make `out` ready to build in.

    Raises:
      UserError: it holds a corpus, or a part of one, of another recipe.
    """
    mark = out / ".work" / "recipe.json"
    for path, what in (
        (out / "manifest.json", "a corpus"),
        (mark, "an unfinished one"),
    ):
        if path.exists():
            former = read_json(path).get("recipe")
            if former != fingerprint:
                raise UserError(
                    f"{out} holds {what} of another recipe (config or input files "
                    "differ): give another --out, or delete it first"
                )
            return path.name == "manifest.json"
    for name in ("sources", "heldout", "rejected", "tokenizer.model"):
        if (out / name).exists():
            raise UserError(
                f"{out} has {name!r} in it, but no corpus: give another --out"
            )
    write_json(mark, {"recipe": fingerprint})
    return False


def make(
    cfg: Config,
    out: Path,
    inputs: Sequence[Input],
    heldout: Heldout,
    pool: Pool,
    progress: bool,
) -> dict[str, Any]:
    """Everything of a build but the manifest, which it returns."""
    corpus = cfg.corpus
    in_heldout = {}
    for spec in corpus.heldout:
        rows: dict[str, Any] = {}
        for language, units in heldout[spec.name].items():
            path = out / "heldout" / f"{spec.name}.{language}.jsonl"
            with atomic(path) as temporary:
                lines_of = [
                    json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n"
                    for i, t in units
                ]
                temporary.write_text("".join(lines_of), "utf-8")
            rows[language] = {
                "units": len(units),
                "bytes": sum(len(t.encode()) for _, t in units),
                "sha256": file_sha256(path),
            }
        in_heldout[spec.name] = {"parallel": spec.parallel, "languages": rows}

    counts, scanned = scan_all(corpus, inputs, out / ".work" / "scan", pool, progress)
    merge_rejected(inputs, out)
    check_bad(corpus, counts, out / "rejected")
    files = select(scanned, heldout)

    sources: dict[str, dict[str, Any]] = {}
    for name, row in counts.items():
        of_source = [f for f in files if f.source == name]
        language, domain = name.split("/")
        held = sum(f.held_out for f in of_source)
        kept = sum(int(f.keep.sum()) for f in of_source)
        row["rejected"] |= {"held out": held} if held else {}
        duplicates = sum(f.duplicates for f in of_source)
        assert row["read"] == kept + duplicates + sum(row["rejected"].values()), name
        if not kept:
            raise UserError(
                f"source {name} has no document left: {row['read']} read, {duplicates} "
                f"duplicates, rejected {row['rejected'] or 0}; see {out / 'rejected'}"
            )
        sources[name] = {
            "language": language,
            "domain": domain,
            "documents_read": row["read"],
            "documents": kept,
            "characters": sum(int(f.characters[f.keep].sum()) for f in of_source),
            "bytes": sum(int(f.bytes[f.keep].sum()) for f in of_source),
            "tokens": 0,
            "records": 0,
            "shards": [],
            "rejected": row["rejected"],
            "duplicates": duplicates,
        }
    model = out / "tokenizer.model"
    if not model.exists():
        if corpus.tokenizer.model:
            Tokenizer(corpus.tokenizer.model).save(model)
        else:
            list(pool.run(fit_tokenizer, [(corpus, files, model)]))
    tokenizer = Tokenizer(model)

    plan = plan_shards(files, corpus.shard_bytes)
    tokenise_all(corpus, out, sources, plan, tokenizer.vocab_size, pool, progress)
    return {
        "format": FORMAT,
        "record_tokens": corpus.record_tokens,
        "dtype": "uint16" if token_dtype(tokenizer.vocab_size) == "<u2" else "uint32",
        "languages": list(cfg.languages),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "sources": sources,
        "heldout": in_heldout,
    }


def scan_all(
    cfg: CorpusConfig, inputs: Sequence[Input], work: Path, pool: Pool, progress: bool
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, Path]]]:
    """Counts by source, and (source, folder of the scan) of each input."""
    folders = [work / str(i) for i in range(len(inputs))]
    sizes = [sum(os.path.getsize(p) for p in item.files) for item in inputs]
    jobs = [
        (item, folder, cfg.min_chars, cfg.shard_bytes)
        for item, folder in zip(inputs, folders, strict=True)
    ]
    results: list[dict[str, Any]] = [{}] * len(jobs)
    with progress_bar("read", sum(sizes), progress) as bar:
        documents = 0
        for i, done in pool.run(scan, jobs):
            results[i] = done
            documents += done["read"]
            bar.set_postfix_str(f"{documents} documents", refresh=False)
            bar.update(sizes[i])
    counts: dict[str, dict[str, Any]] = {}
    for item, done in zip(inputs, results, strict=True):
        row = counts.setdefault(item.source, {"read": 0, "rejected": {}, "bad": ""})
        row["read"] += done["read"]
        row["rejected"] = dict(
            sorted((Counter(row["rejected"]) + Counter(done["rejected"])).items())
        )
        row["bad"] = row["bad"] or done["bad"]
        if done["bad"] and progress:
            print(
                f"left out of {item.source}: {done['rejected']}, first: {done['bad']}",
                file=sys.stderr,
            )
    return counts, [(i.source, f) for i, f in zip(inputs, folders, strict=True)]


def progress_bar(what: str, size: int, progress: bool) -> tqdm:
    return tqdm(
        total=size,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
    )


def merge_rejected(inputs: Sequence[Input], out: Path) -> None:
    """rejected/<lang>.<domain>.jsonl from the scans, for sources that have some."""
    for source in dict.fromkeys(item.source for item in inputs):
        parts = [
            out / ".work" / "scan" / str(i) / "rejected.jsonl"
            for i, item in enumerate(inputs)
            if item.source == source
        ]
        if any(p.stat().st_size for p in parts):
            path = out / "rejected" / f"{source.replace('/', '.')}.jsonl"
            with atomic(path) as temporary, open(temporary, "wb") as f:
                for part in parts:
                    with open(part, "rb") as rows:
                        shutil.copyfileobj(rows, f)


def check_bad(cfg: CorpusConfig, counts: Mapping[str, Any], rejected: Path) -> None:
    for name, row in counts.items():
        if not row["read"]:
            raise UserError(f"source {name} has no documents: check its files")
        reasons = {k: n for k, n in row["rejected"].items() if k not in HARMLESS}
        bad = sum(reasons.values())
        if bad > cfg.max_bad_share * row["read"]:
            listed = ", ".join(f"{n} {k}" for k, n in reasons.items())
            raise UserError(
                f"source {name}: {bad} of {row['read']} documents cannot be used "
                f"({listed}), first {row['bad']}; all are in "
                f"{rejected / name.replace('/', '.')}.jsonl; correct the source, or "
                f"raise corpus.max_bad_share={cfg.max_bad_share}"
            )


def tokenise_all(
    cfg: CorpusConfig,
    out: Path,
    sources: dict[str, dict[str, Any]],
    plan: Mapping[str, list[list[Part]]],
    vocab_size: int,
    pool: Pool,
    progress: bool,
) -> None:
    """Write all shards and token counts; fill in `sources`."""
    jobs, owners = [], []
    for name, shards in plan.items():
        for number, parts in enumerate(shards):
            file = f"sources/{name}/{number:05d}.arrayrecord"
            marker = out / ".work" / "shards" / name / f"{number:05d}.json"
            owners.append((name, file, marker))
            jobs.append(
                (out / "tokenizer.model", parts, cfg.record_tokens, out / file, marker)
            )
    results: list[dict[str, Any]] = [{}] * len(jobs)
    total = sum(s["bytes"] for s in sources.values())
    with progress_bar("tokenise", total, progress) as bar:
        documents = 0
        for i, done in pool.run(tokenise, jobs):
            results[i] = done
            documents += done["documents"]
            bar.set_postfix_str(f"{documents} documents", refresh=False)
            bar.update(done["bytes"])
    totals = {name: np.zeros(vocab_size, np.int64) for name in sources}
    seen: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for (name, file, marker), done in zip(owners, results, strict=True):
        totals[name] += np.load(marker.with_suffix(".npy"))
        seen[name].update({k: done[k] for k in ("documents", "characters", "bytes")})
        shard = {"file": file} | {k: done[k] for k in ("records", "tokens", "sha256")}
        sources[name]["shards"].append(shard)
        sources[name]["tokens"] += done["tokens"]
        sources[name]["records"] += done["records"]
    for name, source in sources.items():
        assert all(seen[name][k] == source[k] for k in seen[name]), name
        path = out / "sources" / name / "token_counts.npy"
        with atomic(path) as temporary, open(temporary, "wb") as f:
            np.save(f, totals[name])
    # Temporary files of jobs that were killed.
    for stray in (*out.glob(".*.tmp"), *out.glob("*/**/.*.tmp")):
        stray.unlink(missing_ok=True)


def train_tokenizer(
    cfg: CorpusConfig, out: Path, workers: int | None = None, progress: bool = True
) -> Path:
    """Train the tokenizer that `build` would, without the corpus; returns its path."""
    out = Path(out)
    inputs = [item for source in cfg.sources for item in expand(source)]
    if not inputs:
        raise UserError("corpus.sources is empty: the tokenizer needs text")
    heldout = read_heldout(cfg)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=out.parent) as work:
        with Pool(workers) as pool:
            counts, scanned = scan_all(cfg, inputs, Path(work), pool, progress)
            check_bad(cfg, counts, Path(work))
            list(pool.run(fit_tokenizer, [(cfg, select(scanned, heldout), out)]))
    return out


# ------------------------------------------------------------------ using a corpus


@dataclass(frozen=True)
class SourceInfo:
    name: str
    language: str
    domain: str
    documents: int
    bytes: int  # UTF-8, of the cleaned text
    tokens: int  # with BOS and EOS, without padding and repeats
    records: int
    shards: tuple[str, ...]  # paths


@dataclass(frozen=True)
class FilePart:
    """A whole ArrayRecord file, so that opening a source needn't open its files."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Records(Sequence):
    """A source's records, int32[record_tokens + 1] each. Picklable, thread-safe."""

    def __init__(self, parts: Sequence[FilePart], dtype: str):
        self._source = ArrayRecordDataSource(parts)
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self._source):
            raise IndexError(f"record {i} is outside 0..{len(self._source) - 1}")
        return np.frombuffer(self._source[i], self._dtype).astype(np.int32)


@dataclass(frozen=True)
class Corpus:
    """An opened corpus folder (`open_corpus`). Picklable; holds no open files."""

    folder: Path
    manifest: dict[str, Any]
    sources: dict[str, SourceInfo]

    def examples(self, seq_len: int) -> dict[str, int]:
        """Source -> number of examples of `seq_len` tokens."""
        size = self.manifest["record_tokens"]
        if seq_len < 1 or size % seq_len:
            raise UserError(
                f"data.seq_len={seq_len} does not divide the {size} tokens of a record "
                f"of corpus {self.folder}: change it, or build with another "
                "corpus.record_tokens"
            )
        return {n: s.records * (size // seq_len) for n, s in self.sources.items()}

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer(self.folder / "tokenizer.model")
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(
                f"{self.folder}/tokenizer.model is not the one that the corpus was "
                "made with: put the right one back, or build the corpus again"
            )
        return tokenizer

    def heldout_sets(self) -> dict[str, list[str]]:
        """Name of each held-out set -> its languages."""
        return {k: list(v["languages"]) for k, v in self.manifest["heldout"].items()}

    def heldout(self, name: str, language: str) -> list[tuple[str, str]]:
        """(id, text) of a set's units in one language, in the set's order."""
        sets = self.heldout_sets()
        if language not in sets.get(name, ()):
            known = "; ".join(f"{k}: {' '.join(v)}" for k, v in sets.items())
            raise UserError(
                f"corpus {self.folder} has no held-out set {name!r} in {language!r}; "
                f"it has {known or 'none'}"
            )
        path = self.folder / "heldout" / f"{name}.{language}.jsonl"
        try:
            with open(path, encoding="utf-8") as f:
                units = [(u["id"], u["text"]) for u in map(json.loads, f)]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path} cannot be read ({e}): build the corpus again"
            ) from e
        if len(units) != self.manifest["heldout"][name]["languages"][language]["units"]:
            raise UserError(f"{path} has lost units: build the corpus again")
        return units

    def token_counts(self, source: str) -> np.ndarray:
        """int64[V]: how often each token occurs in a source, BOS and EOS included."""
        path = self.folder / "sources" / self._source(source).name / "token_counts.npy"
        try:
            return np.load(path)
        except (OSError, ValueError) as e:
            raise UserError(
                f"{path} cannot be read ({e}): build the corpus again"
            ) from e

    def records(self, source: str) -> Records:
        """Random access to a source's records, int32[record_tokens + 1] each."""
        rows = self.manifest["sources"][self._source(source).name]["shards"]
        parts = [
            FilePart(str(self.folder / r["file"]), 0, r["records"], r["records"])
            for r in rows
        ]
        return Records(parts, self.manifest["dtype"])

    def _source(self, name: str) -> SourceInfo:
        if name not in self.sources:
            raise UserError(
                f"corpus {self.folder} has no source {name!r}; it has "
                f"{', '.join(self.sources)}"
            )
        return self.sources[name]


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"{path} cannot be read ({first_line(e)}): delete the folder and build the "
            "corpus again"
        ) from e
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: build the corpus again")
    return data


def open_corpus(path: str | Path) -> Corpus:
    """Open a corpus folder; checks the manifest and each shard's number of records.

    Raises:
      UserError: no folder, an unfinished build, a broken manifest, a missing shard.
    """
    folder = Path(path)
    file = folder / "manifest.json"
    if not file.exists():
        if (folder / ".work").exists():
            raise UserError(
                f"corpus {folder} is unfinished: run the same `gamayun corpus build "
                f"CONFIG --out {folder}` again, it goes on where it was"
            )
        raise UserError(
            f"there is no corpus in {folder}: make it with `gamayun corpus build "
            f"CONFIG --out {folder}`"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {manifest.get('format')!r}, this version reads "
            f"{FORMAT}: build the corpus again"
        )
    sources: dict[str, SourceInfo] = {}
    try:
        for name, s in manifest["sources"].items():
            shards = [(folder / row["file"], row["records"]) for row in s["shards"]]
            sources[name] = SourceInfo(
                name,
                s["language"],
                s["domain"],
                s["documents"],
                s["bytes"],
                s["tokens"],
                s["records"],
                tuple(str(p) for p, _ in shards),
            )
            if sum(n for _, n in shards) != s["records"]:
                raise KeyError(f"records of {name}")
            for shard, records in shards:
                check_shard(shard, records)
        _ = manifest["record_tokens"], manifest["recipe"], manifest["heldout"]
        _ = manifest["tokenizer"]["fingerprint"], manifest["tokenizer"]["vocab_size"]
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise KeyError("dtype")
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{file} lacks or contradicts {e}: it was changed by hand or by another "
            "program; build the corpus again"
        ) from e
    return Corpus(folder, manifest, sources)


def check_shard(path: Path, records: int) -> None:
    if not path.is_file():
        raise UserError(f"shard {path} is missing: copy or build the corpus again")
    try:
        reader = ArrayRecordReader(str(path), "")
        try:
            found = reader.num_records()
        finally:
            reader.close()
    except (RuntimeError, ValueError, OSError, IndexError) as e:
        raise UserError(
            f"shard {path} is damaged ({first_line(e)}): copy or build the corpus again"
        ) from e
    if found != records:
        raise UserError(
            f"shard {path} has {found} records, {records} expected: copy or build the "
            "corpus again"
        )


def verify(corpus: Corpus) -> None:
    """Read everything: hashes of shards and held-out files, counts of tokens.

    Raises:
      UserError: naming the first file that is not as the manifest says.
    """

    def expect(what: Path | str, found: Any, expected: Any) -> None:
        if found != expected:
            raise UserError(
                f"{what}: found {found}, the manifest says {expected}: copy or build "
                "the corpus again"
            )

    tokenizer = corpus.tokenizer()
    for name, languages in corpus.heldout_sets().items():
        for language in languages:
            path = corpus.folder / "heldout" / f"{name}.{language}.jsonl"
            row = corpus.manifest["heldout"][name]["languages"][language]
            corpus.heldout(name, language)
            expect(path, file_sha256(path), row["sha256"])
    for name, source in corpus.manifest["sources"].items():
        tokens = -source["records"] + len(source["shards"])  # repeated tokens
        documents = 0
        for row in source["shards"]:
            path = corpus.folder / row["file"]
            expect(path, file_sha256(path), row["sha256"])
        for record in corpus.records(name):
            expect(name, len(record), corpus.manifest["record_tokens"] + 1)
            tokens += int(np.count_nonzero(record != tokenizer.pad_id))
            documents += int(np.count_nonzero(record[:-1] == tokenizer.bos_id))
        expect(f"tokens of {name}", tokens, source["tokens"])
        expect(f"documents of {name}", documents, source["documents"])
        counts = corpus.token_counts(name)
        expect(f"token counts of {name}", int(counts.sum()), source["tokens"])


def inspect(path: str | Path) -> str:
    """A table of what a corpus holds, and the beginning of a record of each source."""
    corpus = open_corpus(path)
    m = corpus.manifest
    tokenizer = corpus.tokenizer()
    head = ("source", "documents", "bytes", "tokens", "bytes/token", "records")
    table = [(*head, "duplicates", "rejected")]
    for name, s in m["sources"].items():
        rejected = ", ".join(f"{n:,} {reason}" for reason, n in s["rejected"].items())
        numbers = (s["documents"], s["bytes"], s["tokens"])
        ratio = f"{s['bytes'] / s['tokens']:.2f}"
        more = (ratio, f"{s['records']:,}", f"{s['duplicates']:,}", rejected or "0")
        table.append((name, *(f"{n:,}" for n in numbers), *more))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text = [
        f"corpus {corpus.folder}: records of {m['record_tokens']} tokens "
        f"({m['dtype']}), tokenizer of {m['tokenizer']['vocab_size']} pieces, "
        f"recipe {m['recipe'][:12]}"
    ]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)]
        text.append("  ".join([*cells, row[-1]]))
    for name, languages in corpus.heldout_sets().items():
        rows = m["heldout"][name]["languages"]
        kind = "parallel" if m["heldout"][name]["parallel"] else "not parallel"
        units = sorted({rows[k]["units"] for k in languages})
        count = f"{units[0]}" if len(units) == 1 else f"{units[0]} to {units[-1]}"
        text.append(f"held out {name} ({kind}): {count} units in {' '.join(languages)}")
    for name in corpus.sources:
        begin = tokenizer.decode(corpus.records(name)[0].tolist())
        text.append(f"{name}: {' / '.join(begin.split(chr(10))[:3])[:100]}")
    return "\n".join(text)
