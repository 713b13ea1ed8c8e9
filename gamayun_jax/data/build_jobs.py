"""The jobs of a corpus build: what worker processes do, each job restartable.

`scan` reads, cleans and digests one input file; its text goes to compressed chunks in
the work folder. `select` finds the duplicates. `tokenise` writes one shard. Jobs depend
on the input alone, so that the bytes of a corpus depend neither on the number of
workers nor on interruptions.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from gamayun_jax.config import CorpusConfig, UserError
from gamayun_jax.data import tokenizer as tok
from gamayun_jax.data.contamination import Contamination
from gamayun_jax.data.corpus import check_shard, token_dtype
from gamayun_jax.data.documents import (
    EXCERPT,
    HARMLESS,
    BadDocument,
    Damage,
    Document,
    Input,
    clean,
    digest,
    read_input,
)
from gamayun_jax.data.files import atomic, file_sha256, sync, write_json
from gamayun_jax.data.tokenizer import Tokenizer

WRITER_OPTIONS = "group_size:1,uncompressed"
BATCH_BYTES = 1_000_000  # text given to the tokenizer at a time
COMPARED = 100_000  # characters compared with the held-out texts at a time
Heldout = dict[str, dict[str, list[tuple[str, str]]]]  # set -> language -> (id, text)


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


@functools.lru_cache(maxsize=1)
def contamination(folder: Path) -> Contamination:
    """What finds the texts of a corpus's folder of held-out files in others."""
    found = Contamination()
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as f:
            units = [(u["id"], u["text"]) for u in map(json.loads, f)]
        found.add(path.name.split(".")[0], units)
    return found


def scan(
    item: Input,
    out: Path,
    min_chars: int,
    shard_bytes: int,
    heldout: Path | None = None,
    remove: bool = True,
) -> dict[str, Any]:
    """Read and clean one input file into the folder `out`; returns its counts.

    docs.npz: digest S16[N], bytes, characters, chunk int64[N] of the clean documents,
    held bool[N] (not to be trained on); <chunk>.zst: their UTF-8 texts, one after the
    other; rejected.jsonl; done.json.

    Args:
      heldout: folder of the held-out files; documents that hold one of their texts are
        counted, and `held` if they equal it or if `remove`.
    """
    if (out / "done.json").exists():
        return json.loads((out / "done.json").read_text("utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="scan-", dir=out.parent))
    digests: list[bytes] = []
    sizes: list[tuple[int, int, int]] = []
    reasons: Counter[str] = Counter()
    damaged: list[dict[str, Any]] = []
    held: list[bool] = []
    of_set: Counter[str] = Counter()
    waiting: list[Document] = []  # clean documents not yet compared with the held-out
    first_bad = ""
    read, chunk, filled = 0, -1, 0
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(
            open(work / "rejected.jsonl", "w", encoding="utf-8")
        )
        chunk_file: Any = None

        def reject(file: str, line: int, reason: str, detail: str, text: str) -> None:
            row = {"file": file, "line": line, "reason": reason, "detail": detail}
            # A rejected text may hold lone surrogates: escape what isn't ASCII.
            rejected.write(json.dumps({**row, "text": text[:EXCERPT]}) + "\n")

        def compare() -> None:
            finder = contamination(heldout) if heldout else None
            texts = [d.text for d in waiting]
            verdicts = finder.judge(texts) if finder else [()] * len(texts)
            for found, units in zip(waiting, verdicts, strict=True):
                gone = any(u.equal for u in units) or (bool(units) and remove)
                held.append(gone)
                of_set.update({u.set for u in units})
                if units:
                    reason = "held out" if gone else "held out, kept"
                    detail = f"{units[0].set}: {units[0].id}"
                    reasons.update(["held out"] if gone else [])
                    reject(found.file, found.line, reason, detail, found.text)
            waiting.clear()

        size = 0  # of the texts in `waiting`
        for found in read_input(item):
            if isinstance(found, Damage):
                told = {"file": found.file, "reason": found.reason}
                numbers = {"after": found.line - 1, "unread": found.unread}
                damaged.append({**told, "detail": found.detail, **numbers})
                continue
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
                reject(
                    found.file, found.line, found.reason, found.detail, found.excerpt
                )
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
            waiting.append(Document(text, found.file, found.line))
            size += len(text)
            if size >= COMPARED:
                compare()
                size = 0
        compare()
        if chunk_file:
            chunk_file.close()
    table = np.array(sizes, np.int64).reshape(-1, 3)
    np.savez(
        work / "docs.npz",
        digest=np.array(digests, "S16"),
        bytes=table[:, 0],
        characters=table[:, 1],
        chunk=table[:, 2],
        held=np.array(held, bool),
    )
    done: dict[str, Any]
    done = {"read": read, "rejected": dict(sorted(reasons.items())), "bad": first_bad}
    done |= {"held_out": dict(of_set), "damaged": damaged}
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


def select(scanned: Sequence[tuple[str, Path]]) -> list[Scanned]:
    """Keep the first of equal documents over the whole corpus, and none held out."""
    files = []
    for source, folder in scanned:
        with np.load(folder / "docs.npz") as docs:
            columns = {k: docs[k] for k in ("digest", "bytes", "characters", "chunk")}
            keep = ~docs["held"]
        files.append(Scanned(source, folder, **columns, keep=keep))
    digests = np.concatenate([np.zeros(0, "S16"), *(f.digest for f in files)])
    # The index of the first document that is equal to each one.
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    first = first[inverse]
    begin = 0
    for file in files:
        end = begin + len(file.keep)
        repeated = file.keep & (first[begin:end] != np.arange(begin, end))
        file.keep &= ~repeated
        file.duplicates = int(repeated.sum())
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
