"""A tokenised corpus on disk, as training and evaluation read it.


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
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import lzma
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gamayun_jax.config import Config, UserError, check_local
from gamayun_jax.data.documents import first_line
from gamayun_jax.data.files import (
    file_sha256,
    open_files_limit,
    read_json,
    read_json_lines,
    unreadable,
)
from gamayun_jax.data.tokenizer import Tokenizer, read_tokenizer

FORMAT = 1


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 65_536 else "<u4"


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


class BadRecordError(UserError):
    """A record that cannot be used; names the shard, the record and the reason."""

    def __init__(self, shard: str, record: int, reason: str):
        super().__init__(
            f"shard {shard}, record {record}: {reason}: copy or build the corpus "
            "again, or set data.faults=set_aside to go on without such records"
        )
        self.shard, self.record, self.reason = shard, record, reason


class OpenShards:
    """The ArrayRecord files that this process keeps open: those used last, however
    many a corpus has. Thread-safe."""

    def __init__(self, limit: int = 0):
        """`limit`: of open files; default: half of what the system allows."""
        self._limit = limit
        self._lock = threading.Lock()
        # path -> [reader, whether it was used again since it was last looked at]
        self._open: dict[str, list[Any]] = {}

    def read(self, path: str, record: int) -> bytes:
        """A record's bytes; raises what ArrayRecord does."""
        # No lock and no change of order for a file that is open.
        entry = self._open.get(path)
        if entry is None:
            entry = self._add(path)
        else:
            entry[1] = True
        return entry[0].read([record])[0]

    def _add(self, path: str) -> list[Any]:
        reader = ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=32_768
        )
        entry = [reader, False]
        with self._lock:
            self._limit = self._limit or open_files_limit() // 2
            # The oldest goes, unless it was used: then it is the newest again. One
            # that is being read is closed by the last thread that lets go of it.
            while len(self._open) >= self._limit:
                oldest = next(iter(self._open))
                former = self._open.pop(oldest)
                if former[1]:
                    former[1] = False
                    self._open[oldest] = former
            self._open[path] = entry
        return entry

    def forget(self, paths: Iterable[str]) -> None:
        """Open these files anew when they are read again."""
        with self._lock:
            for path in paths:
                self._open.pop(path, None)

    def __len__(self) -> int:
        return len(self._open)


OPEN = OpenShards()


class Records(Sequence):
    """A source's records, int32[record_tokens + 1] each. Picklable, thread-safe.

    ArrayRecord has a hash of each chunk, so changed bytes are an error here, as are
    token ids that are none. A file that cannot be read at all is tried again for
    `retry_seconds`, since file systems come back.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        dtype: str,
        vocab_size: int,
        length: int,
        retry_seconds: float = 0.0,
        damaged: Mapping[str, str] | None = None,
    ):
        """A source's records.

        Args:
          shards: (file, its number of records) of each.
          length: tokens of each record.
          damaged: file -> reason never to read it.
        """
        self._files = [file for file, _ in shards]
        OPEN.forget(self._files)  # they may have changed
        self._ends = list(itertools.accumulate(n for _, n in shards))
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._vocab_size, self._length = vocab_size, length
        self._retry_seconds = retry_seconds
        self._damaged = dict(damaged or {})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} is outside 0..{len(self) - 1}")
        tokens = np.frombuffer(self._read(int(i)), self._dtype)
        if len(tokens) != self._length or tokens.max() >= self._vocab_size:
            reason = f"{len(tokens)} tokens, {self._length} expected"
            if len(tokens) == self._length:
                reason = f"token id {tokens.max()} is beyond the {self._vocab_size}"
            raise BadRecordError(*self.locate(i), reason)
        return tokens.astype(np.int32)

    def _read(self, i: int) -> bytes:
        shard, record = self.locate(i)
        begin, pause = time.monotonic(), 0.1
        while shard not in self._damaged:
            try:
                return OPEN.read(shard, record)
            except (RuntimeError, ValueError, OSError, IndexError) as e:
                reason = first_line(e)
            OPEN.forget([shard])
            try:
                with open(shard, "rb") as f:
                    f.read(1)
            except OSError as e:  # the file system's fault: it may come back
                waited = time.monotonic() - begin
                if waited < self._retry_seconds:
                    time.sleep(pause)
                    pause = min(2 * pause, 10.0)
                    continue
                reason = f"{e.strerror}, for {waited:.0f} s"
                self._damaged[shard] = reason
            try:
                return OPEN.read(shard, record)  # it came back between the two
            except (RuntimeError, ValueError, OSError, IndexError):
                raise BadRecordError(shard, record, reason) from None
        raise BadRecordError(shard, record, self._damaged[shard])

    def locate(self, i: int) -> tuple[str, int]:
        """(file, number of the record in it) of record number `i`."""
        k = bisect.bisect_right(self._ends, i)
        return self._files[k], i - (self._ends[k - 1] if k else 0)


@dataclass(frozen=True)
class Corpus:
    """An opened corpus folder (`open_corpus`). Picklable; holds no open files."""

    folder: Path
    manifest: dict[str, Any]
    sources: dict[str, SourceInfo]
    damaged: Mapping[str, str] = field(default_factory=dict)  # shard -> reason

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

    def contents(self) -> dict[str, Any]:
        """What tells other texts from these, as plain JSON: of each source, [records,
        SHA-256] of its shards in order; of each held-out file, its SHA-256. Of the
        hashes, the first 16 digits: a checkpoint keeps them all."""
        held = self.manifest["heldout"]
        return {
            "sources": {
                name: [[r["records"], r["sha256"][:16]] for r in source["shards"]]
                for name, source in self.manifest["sources"].items()
            },
            "heldout": {
                f"{name} in {language}": row["sha256"][:16]
                for name in held
                for language, row in held[name]["languages"].items()
            },
        }

    def tokenizer(self) -> Tokenizer:
        tokenizer = read_tokenizer(self.folder / "tokenizer.model")
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
            units = [(u["id"], u["text"]) for u in read_json_lines(path)]
        except OSError as e:
            raise unreadable(path, e) from e
        except (ValueError, KeyError) as e:
            raise UserError(
                f"{path} is damaged ({e}): copy or build the corpus again"
            ) from e
        if len(units) != self.manifest["heldout"][name]["languages"][language]["units"]:
            raise UserError(f"{path} has lost units: build the corpus again")
        return units

    def packed(self, name: str, language: str) -> dict[str, int]:
        """`xz_bytes` of texts of a set by their `text_key`; those of former versions
        have none."""
        return dict(self.manifest["heldout"][name]["languages"][language].get("xz", {}))

    def token_counts(self, source: str) -> np.ndarray:
        """int64[V]: how often each token occurs in a source, BOS and EOS included."""
        path = self.folder / "sources" / self._source(source).name / "token_counts.npy"
        try:
            return np.load(path)
        except OSError as e:
            raise unreadable(path, e) from e
        except ValueError as e:
            raise UserError(
                f"{path} is damaged ({e}): copy or build the corpus again"
            ) from e

    def records(self, source: str, retry_seconds: float = 0.0) -> Records:
        """Random access to a source's records, int32[record_tokens + 1] each."""
        rows = self.manifest["sources"][self._source(source).name]["shards"]
        shards = [(str(self.folder / r["file"]), r["records"]) for r in rows]
        m = self.manifest
        sizes = (m["tokenizer"]["vocab_size"], m["record_tokens"] + 1)
        return Records(shards, m["dtype"], *sizes, retry_seconds, self.damaged)

    def _source(self, name: str) -> SourceInfo:
        if name not in self.sources:
            raise UserError(
                f"corpus {self.folder} has no source {name!r}; it has "
                f"{', '.join(self.sources)}"
            )
        return self.sources[name]


def subsample_units(units: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The first `limit` units by the hash of their id: the same in every language.

    Empty units stay, at 0 bits: without one, a language's units were not the others'.
    """
    if not limit or limit >= len(units):
        return units
    return sorted(units, key=lambda u: hashlib.sha256(u[0].encode()).digest())[:limit]


def text_key(text: bytes) -> str:
    """What tells one text from others in a manifest."""
    return hashlib.sha256(text).hexdigest()[:16]


@functools.lru_cache(maxsize=256)  # tasks are summed up at every evaluation
def xz_bytes(text: bytes) -> int:
    """Size of `xz -9e` of a text; about a second for each megabyte."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def expected_corpus(cfg: Config, tokens: Mapping[str, int]) -> Corpus:
    """The corpus of `cfg` before it is built, to plan with: its sources alone.

    Args:
      tokens: source -> its expected size.
    """
    size = cfg.corpus.record_tokens
    sources = {}
    for name, n in tokens.items():
        language, domain = name.split("/")
        records = -(-n // size)
        sources[name] = SourceInfo(name, language, domain, 0, 0, n, records, ())
    return Corpus(Path(cfg.data.corpus), {"record_tokens": size}, sources)


def open_corpus(
    path: str | Path, set_aside: bool = False, hashes: bool = False
) -> Corpus:
    """Open a corpus folder; checks the manifest and each shard's number of records.

    Args:
      set_aside: list missing and damaged shards in `damaged` instead of raising.
      hashes: read every shard and compare its SHA-256 too.

    Raises:
      UserError: no folder, an unfinished build, a broken manifest, a missing shard.
    """
    check_local(path, "corpus ")
    folder = Path(path)
    file = folder / "manifest.json"
    try:
        there = bool(os.stat(file))
    except (FileNotFoundError, NotADirectoryError):
        there = False
    except OSError as e:
        raise unreadable(file, e) from e
    if not there:
        if (folder / ".work").exists():
            raise UserError(
                f"corpus {folder} is unfinished: run the same `gamayun corpus build "
                f"CONFIG --out {folder}` again, it goes on where it was"
            )
        raise UserError(
            f"there is no corpus in {folder}: make it with `gamayun corpus build "
            f"CONFIG --out {folder}`"
        )
    manifest = read_json(file, "copy or build the corpus again")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {manifest.get('format')!r}, this version reads "
            f"{FORMAT}: build the corpus again"
        )
    sources: dict[str, SourceInfo] = {}
    damaged: dict[str, str] = {}
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
            for row in s["shards"]:
                shard = folder / row["file"]
                if not shard.resolve().is_relative_to(folder.resolve()):
                    raise UserError(
                        f"{file} names a shard outside of the corpus: {row['file']}"
                    )
                try:
                    check_shard(shard, row["records"])
                    if hashes and file_sha256(shard) != row["sha256"]:
                        raise UserError(
                            f"shard {shard} has another SHA-256 than the manifest "
                            "says: copy or build the corpus again"
                        )
                except UserError as e:
                    if not set_aside:
                        raise
                    damaged[str(shard)] = str(e)
        _ = manifest["record_tokens"], manifest["recipe"], manifest["heldout"]
        _ = manifest["tokenizer"]["fingerprint"]
        sizes = [manifest["record_tokens"], manifest["tokenizer"]["vocab_size"]]
        for held in manifest["heldout"].values():
            sizes += [row["units"] for row in held["languages"].values()]
        sizes += [n for s in sources.values() for n in (s.bytes, s.tokens, s.records)]
        if not all(type(n) is int and n >= 0 for n in sizes) or not sizes[0]:
            raise TypeError("its own numbers")
        Corpus(folder, manifest, sources).contents()  # every hash is there
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise KeyError("dtype")
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{file} lacks or contradicts {e}: it was changed by hand or by another "
            "program; build the corpus again"
        ) from e
    return Corpus(folder, manifest, sources, damaged)


def check_shard(path: Path, records: int) -> None:
    try:
        with open(path, "rb"):
            pass
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(
            f"shard {path} is missing: copy or build the corpus again"
        ) from e
    except OSError as e:
        raise unreadable(path, e) from e
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


def told_damage(damage: Mapping[str, Any]) -> str:
    """What a manifest's entry of an input file says that was not read to its end."""
    unread = damage["unread"]
    lost = "what follows" if unread is None else f"{unread:,} documents"
    return (
        f"{damage['file']}: {damage['reason']} after document {damage['after']:,}, "
        f"{lost} not read ({damage['detail']})"
    )


def told_copies(manifest: Mapping[str, Any], name: str) -> list[str]:
    """What a manifest says of a held-out set's texts in the training documents."""
    held = manifest["heldout"][name]
    told = [
        f"WARNING: units of {k} and of the first language are unlike in length "
        f"(correlation {r}): are they translations, in the same order?"
        for k, r in held.get("unlike_lengths", {}).items()
    ]
    if len(held["languages"]) > 1 and (why := held.get("unlike_ids")):
        told.append(
            f"not parallel, since {why}: no parity, no alignment of it (give the same "
            "ids in the same order or, where there are none, parallel=True)"
        )
    if "copies" not in held:  # of a former version
        return [*told, "only documents equal to one of its texts were looked for"]
    sources = manifest["sources"].items()
    found = {k: s["held_out"][name] for k, s in sources if name in s["held_out"]}
    listed = ", ".join(f"{n:,} of {k}" for k, n in found.items())
    done = "removed" if held["copies"] == "remove" else "reported, not removed"
    short = sum(row["short"] for row in held["languages"].values())
    units = sum(row["units"] for row in held["languages"].values())
    line = f"{sum(found.values()):,} documents with its texts {done}"
    told.append(f"{line}: {listed}" if found else "no document has any of its texts")
    if short:
        told.append(
            f"{short:,} of {units:,} texts are too short to be looked for inside of "
            "documents"
        )
    return told


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
    for name, s in m["sources"].items():
        for damage in s.get("damaged", ()):
            text.append(f"DAMAGED: {name} {told_damage(damage)}")
    for name, languages in corpus.heldout_sets().items():
        rows = m["heldout"][name]["languages"]
        kind = "parallel" if m["heldout"][name]["parallel"] else "not parallel"
        units = sorted({rows[k]["units"] for k in languages})
        count = f"{units[0]}" if len(units) == 1 else f"{units[0]} to {units[-1]}"
        text.append(f"held out {name} ({kind}): {count} units in {' '.join(languages)}")
        text += [f"  {line}" for line in told_copies(m, name)]
    for name in corpus.sources:
        begin = tokenizer.decode(corpus.records(name)[0].tolist())
        text.append(f"{name}: {' / '.join(begin.split(chr(10))[:3])[:100]}")
    return "\n".join(text)
