"""The jobs of a corpus build, done by worker processes, each of them restartable.

`scan` reads, cleans and digests one input file; its text goes to compressed chunks in
the work folder. selection.py says which documents stay. `tokenise` writes one shard.
Jobs depend on the input alone, so that the bytes of a corpus depend neither on the
number of workers nor on interruptions.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from gamayun_jax.config import CorpusConfig, TokenizerConfig
from gamayun_jax.data import tokenizer_training
from gamayun_jax.data.cleaning import clean
from gamayun_jax.data.contamination import Contamination
from gamayun_jax.data.corpus import token_dtype
from gamayun_jax.data.documents import (
    EXCERPT,
    HARMLESS,
    BadDocument,
    Damage,
    Document,
    Input,
)
from gamayun_jax.data.files import atomic, file_sha256, sync, write_json
from gamayun_jax.data.heldout_sets import HeldoutSet
from gamayun_jax.data.inputs import read_input
from gamayun_jax.data.model_tokenizer import folder_tokenizer
from gamayun_jax.data.records import with_checksum
from gamayun_jax.data.selection import Scanned
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.data.tokenizer_parity import even_out, tuning_texts

BATCH_BYTES = 1_000_000  # text given to the tokenizer at a time
COMPARED = 100_000  # characters compared with the held-out texts at a time


@functools.lru_cache(maxsize=1)
def contamination(folder: Path) -> Contamination:
    """The finder of all texts in a folder of held-out files."""
    finder = Contamination()
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as f:
            units = [(u["id"], u["text"]) for u in map(json.loads, f)]
        finder.add(path.name.split(".")[0], units)
    return finder


def scan(
    item: Input,
    out: Path,
    min_chars: int,
    shard_bytes: int,
    heldout: Path | None = None,
    remove: bool = True,
) -> dict[str, Any]:
    """Read and clean one input file into the folder `out`; returns its counts.

    docs.npz: digest S16[N], id S16[N] (of the id; empty without one), bytes,
    characters, chunk int64[N] of the clean documents, held bool[N] (not to be trained
    on); <chunk>.zst: their UTF-8 texts, one after the other; rejected.jsonl; done.json.

    Args:
      heldout: folder of the held-out files; documents that hold one of their texts are
        counted, and `held` if they equal it or if `remove`.
    """
    if (out / "done.json").exists():
        return json.loads((out / "done.json").read_text("utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="scan-", dir=out.parent))
    with Scanner(work, min_chars, shard_bytes, heldout, remove) as scanner:
        for document in read_input(item):
            scanner.take(document)
    done = scanner.finish()
    for file in work.iterdir():
        sync(file)
    write_json(work / "done.json", done)
    try:
        os.rename(work, out)  # fails if an orphan of a killed build was faster
    except OSError:
        shutil.rmtree(work)
    sync(out.parent)
    return done


class Scanner:
    """The scan of one input file, document by document; see `scan`."""

    def __init__(
        self,
        work: Path,
        min_chars: int,
        shard_bytes: int,
        heldout: Path | None,
        remove: bool,
    ):
        self._work, self._remove = work, remove
        self._min_chars, self._shard_bytes = max(min_chars, 1), shard_bytes
        self._finder = contamination(heldout) if heldout else None
        self._rejected = open(work / "rejected.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._read = 0
        self._reasons: Counter[str] = Counter()
        self._held_out: Counter[str] = Counter()  # by held-out set
        self._damaged: list[dict[str, Any]] = []
        self._first_bad = ""
        # Of the clean documents.
        self._digests: list[bytes] = []
        self._ids: list[bytes] = []
        self._sizes: list[tuple[int, int, int]] = []  # bytes, characters, chunk
        self._held: list[bool] = []
        self._chunk, self._chunk_bytes = -1, 0
        self._chunk_file: Any = None
        self._waiting: list[Document] = []  # not yet compared with held-out texts
        self._waiting_size = 0

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._compare()
        if self._chunk_file:
            self._chunk_file.close()
        self._rejected.close()

    def take(self, document: Document | BadDocument) -> None:
        """Keep a document, or count it and note why it is left out."""
        if isinstance(document, Damage):
            told = {
                "file": document.file,
                "reason": document.reason,
                "detail": document.detail,
            }
            self._damaged.append(
                told | {"after": document.line - 1, "unread": document.unread}
            )
            return
        self._read += 1
        if isinstance(document, Document):
            text = clean(document.text)
            if len(text) >= self._min_chars:
                self._keep(replace(document, text=text))
                return
            reason, excerpt = "too short" if text else "empty", document.text[:EXCERPT]
            document = BadDocument(document.file, document.line, reason, "", excerpt)
        self._reasons[document.reason] += 1
        if not self._first_bad and document.reason not in HARMLESS:
            detail = f" ({document.detail})" if document.detail else ""
            self._first_bad = (
                f"{document.file}:{document.line}: {document.reason}{detail}"
            )
        self._reject(document)

    def _reject(self, bad: BadDocument) -> None:
        # A rejected text may hold lone surrogates: escape what isn't ASCII.
        row = {"file": bad.file, "line": bad.line, "reason": bad.reason}
        row |= {"detail": bad.detail, "text": bad.excerpt}
        self._rejected.write(json.dumps(row) + "\n")

    def _keep(self, document: Document) -> None:
        encoded = document.text.encode()
        if not self._chunk_file or (
            self._chunk_bytes and self._chunk_bytes + len(encoded) > self._shard_bytes
        ):
            if self._chunk_file:
                self._chunk_file.close()
            self._chunk, self._chunk_bytes = self._chunk + 1, 0
            self._chunk_file = zstandard.open(
                self._work / f"{self._chunk}.zst",
                "wb",
                cctx=zstandard.ZstdCompressor(level=1),
            )
        self._chunk_file.write(encoded)
        self._chunk_bytes += len(encoded)
        self._digests.append(hashlib.blake2b(encoded, digest_size=16).digest())
        self._ids.append(id_digest(document.id))
        self._sizes.append((len(encoded), len(document.text), self._chunk))
        self._waiting.append(document)
        self._waiting_size += len(document.text)
        if self._waiting_size >= COMPARED:
            self._compare()

    def _compare(self) -> None:
        """Look for held-out texts in the documents that wait."""
        if self._finder:
            verdicts = self._finder.judge([d.text for d in self._waiting])
        else:
            verdicts = [()] * len(self._waiting)
        for document, units in zip(self._waiting, verdicts, strict=True):
            gone = any(u.equal for u in units) or (bool(units) and self._remove)
            self._held.append(gone)
            self._held_out.update({u.set for u in units})
            if units:
                reason = "held out" if gone else "held out, kept"
                self._reasons.update(["held out"] if gone else [])
                where = f"{units[0].set}: {units[0].id}"
                excerpt = document.text[:EXCERPT]
                self._reject(
                    BadDocument(document.file, document.line, reason, where, excerpt)
                )
        self._waiting, self._waiting_size = [], 0

    def finish(self) -> dict[str, Any]:
        """Write docs.npz; returns the counts."""
        table = np.array(self._sizes, np.int64).reshape(-1, 3)
        np.savez(
            self._work / "docs.npz",
            digest=np.array(self._digests, "S16"),
            id=np.array(self._ids, "S16"),
            bytes=table[:, 0],
            characters=table[:, 1],
            chunk=table[:, 2],
            held=np.array(self._held, bool),
        )
        return {
            "read": self._read,
            "rejected": dict(sorted(self._reasons.items())),
            "bad": self._first_bad,
            "held_out": dict(self._held_out),
            "damaged": self._damaged,
        }


def id_digest(id: str | None) -> bytes:
    """16 bytes that stand for an id; none for None."""
    if id is None:
        return b""
    # An id of JSON may have lone surrogates.
    return hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=16).digest()


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


def fit_tokenizer(
    cfg: CorpusConfig,
    files: Sequence[Scanned],
    heldout: Sequence[HeldoutSet],
    out: Path,
    record: Path,
) -> None:
    """Train the corpus's tokenizer on its kept documents (a job of the pool).

    Args:
      out: the model file.
      record: where the search for even costs is recorded, before `out` is written.
    """
    of_language: dict[str, list[Scanned]] = {}
    for file in files:
        of_language.setdefault(file.source.split("/")[0], []).append(file)

    def train(given: TokenizerConfig) -> Tokenizer:
        shares = tokenizer_training.shares_of(given, list(of_language))
        budgets = {k: int(shares[k] * given.sample_bytes) for k in of_language}
        texts = {k: sample_texts(scans, budgets[k]) for k, scans in of_language.items()}
        return tokenizer_training.train(texts, given)

    if units := tuning_texts(cfg.tokenizer, heldout, list(of_language)):
        tokenizer, rounds = even_out(train, cfg.tokenizer, units)
        write_json(record, rounds)
    else:
        tokenizer = train(cfg.tokenizer)
    tokenizer.save(out)


Part = tuple[Path, int, np.ndarray]  # folder of a scan, chunk, keep bool[n]


@dataclass
class ShardPlan:
    """Consecutive chunks that make one shard, and the bytes of their text."""

    parts: list[Part]
    bytes: int


def plan_shards(
    files: Sequence[Scanned], shard_bytes: int
) -> dict[str, list[ShardPlan]]:
    """Source -> its shards, of about `shard_bytes` each."""
    plan: dict[str, list[ShardPlan]] = {}
    for file in files:
        shards = plan.setdefault(file.source, [])
        for chunk in range(int(file.chunk.max(initial=-1)) + 1):
            inside = file.chunk == chunk
            size = int(file.bytes[inside & file.keep].sum())
            if not size:
                continue
            if not shards or shards[-1].bytes + size > shard_bytes:
                shards.append(ShardPlan([], 0))
            shards[-1].parts.append((file.folder, chunk, file.keep[inside]))
            shards[-1].bytes += size
    return plan


def tokenise(
    folder: Path, parts: Sequence[Part], record_tokens: int, shard: Path, marker: Path
) -> dict[str, Any]:
    """Write one shard, then its token counts (<marker>.npy), then `marker` (JSON).

    Args:
      folder: of the corpus, with its tokenizer.
    """
    tokenizer = folder_tokenizer(folder)
    if marker.exists() and shard.exists():
        done = json.loads(marker.read_text("utf-8"))
        # A former version did not count them: it is made again.
        if "control_texts" in done or not tokenizer.control_texts:
            return done
    start, end, pad = tokenizer.boundaries
    shared = start == end  # one token between two documents
    dtype = token_dtype(tokenizer.vocab_size)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    info = {"documents": 0, "characters": 0, "bytes": 0, "tokens": 0, "records": 0}
    controls = any_of(tokenizer.control_texts)
    spelled: Counter[str] = Counter()  # documents that have one, by each
    stream = np.empty(0, dtype)  # tokens that are not all written yet
    with atomic(shard) as temporary, open(temporary, "wb") as f:

        def write(record: np.ndarray) -> None:
            f.write(with_checksum(record.tobytes(), info["records"]))
            info["records"] += 1

        for texts in batched(t for part in parts for t in chunk_texts(*part)):
            tokens = [start] if shared and not info["tokens"] else []
            for ids in tokenizer.encode_batch(texts):
                tokens += ids if shared else (start, *ids)
                tokens.append(end)
            new = np.array(tokens, dtype)
            counts += np.bincount(new, minlength=len(counts))
            info["documents"] += len(texts)
            info["characters"] += sum(map(len, texts))
            info["bytes"] += sum(len(t.encode()) for t in texts)
            info["tokens"] += len(new)
            for text in texts if controls.pattern else ():
                spelled.update(set(controls.findall(text)))
            stream = np.concatenate([stream, new])
            while len(stream) > record_tokens:
                write(stream[: record_tokens + 1])
                stream = stream[record_tokens:]
        if len(stream) > 1:  # a single token is the last record's last
            missing = record_tokens + 1 - len(stream)
            write(np.concatenate([stream, np.full(missing, pad, dtype)]))
    assert counts.sum() == info["tokens"]
    assert info["records"] == -(-(info["tokens"] - 1) // record_tokens)
    with atomic(marker.with_suffix(".npy")) as temporary, open(temporary, "wb") as f:
        np.save(f, counts)
    done = {**info, "sha256": file_sha256(shard), "control_texts": dict(spelled)}
    write_json(marker, done)
    return done


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """An expression that finds any of the texts. They are grouped by how they begin:
    where a group's beginning is not found, none of it is tried."""
    groups = itertools.groupby(
        sorted(filter(None, texts), reverse=True), lambda t: t[:2]
    )
    alternatives = ("|".join(map(re.escape, group)) for _, group in groups)
    return re.compile("|".join(f"(?:{group})" for group in alternatives))


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
