"""A tokenised corpus on disk, as training and evaluation read it.

A corpus folder:

  manifest.json                      what it holds; written last
  tokenizer.model                    or an imported model's tokenizer.json, ...
  sources/<lang>/<domain>/00000.records ...
  sources/<lang>/<domain>/token_counts.npy        int64[V], counts of each token
  heldout/<set>.<lang>.jsonl                      {"id", "text"}
  rejected/<lang>.<domain>.jsonl                  what was left out, and why

A document's tokens are [BOS, ..., EOS]; by a tokenizer that writes no BOS, [..., EOS]
and an EOS before the first (tokenizer.Boundaries). The documents of a shard make one
stream, cut into records of `record_tokens + 1` tokens with stride `record_tokens`: a
record's last token comes again as the next one's first, so that every token but a
shard's first is the target once. The tail is padded. Tokens are little-endian uint16,
or uint32 if the vocabulary has more than 65,536 pieces.

The manifest's `format` is 2 for flat shards (records.FlatShard): record after record,
each followed by its checksum. In corpora of format 1 they are ArrayRecord files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import AnyPath, Config, UserError
from gamayun_jax.data.files import file_sha256, read_json, read_json_lines, unreadable
from gamayun_jax.data.model_tokenizer import folder_tokenizer
from gamayun_jax.data.records import COPY_AGAIN, SHARDS, Records, check_shard
from gamayun_jax.data.tokenizer import TextCoder, whole_characters
from gamayun_jax.storage import as_path, is_bucket, sizes_below
from gamayun_jax.tables import Table

FORMAT = 2  # of what is built now; records.SHARDS has those that can be read


def token_dtype(vocab_size: int) -> str:
    """NumPy's name of the type that shards keep token ids in."""
    return "<u2" if vocab_size <= 65_536 else "<u4"


@dataclass(frozen=True)
class SourceInfo:
    """A source of a corpus, as its manifest has it."""

    name: str
    language: str
    domain: str
    documents: int
    bytes: int  # UTF-8, of the cleaned text
    tokens: int  # with BOS and EOS, without padding and repeats
    records: int
    shards: tuple[str, ...]  # paths


@dataclass(frozen=True)
class Corpus:
    """An opened corpus folder (`open_corpus`). Picklable; holds no open files.

    Example:
      >>> corpus
      <Corpus build/demo-corpus: 3 sources in 3 languages, ... tokens>
      >>> corpus.heldout_sets()
      {'udhr': ['en', 'ru', 'tr']}
    """

    folder: Path
    manifest: dict[str, Any]
    sources: dict[str, SourceInfo]
    damaged: Mapping[str, str] = field(default_factory=dict)  # shard -> reason

    def __repr__(self) -> str:
        languages = len({s.language for s in self.sources.values()})
        return (
            f"<Corpus {self.folder}: {len(self.sources)} sources in {languages} "
            f"languages, {sum(s.tokens for s in self.sources.values()):,} tokens>"
        )

    def __fspath__(self) -> str:
        return str(self.folder)

    def table(self) -> Table:
        """What is in it by source, and what of the documents was left out."""
        tokenizer, rows = self.tokenizer(), []
        whole = whole_characters(tokenizer)
        for name, s in self.manifest["sources"].items():
            left_out = ", ".join(f"{n:,} {why}" for why, n in s["rejected"].items())
            sizes = [f"{s[k]:,}" for k in ("documents", "bytes", "tokens")]
            sizes.append(f"{s['bytes'] / s['tokens']:.2f}")
            counts = self.token_counts(name)
            counts[[*tokenizer.boundaries]] = 0
            sizes.append(f"{counts[~whole].sum() / max(counts.sum(), 1):.1%}")
            sizes += [f"{s[k]:,}" for k in ("records", "duplicates")]
            rows.append([name, *sizes, left_out or "0"])
        heads = ("source", "documents", "bytes", "tokens", "bytes/token", "byte pieces")
        counts_of = ("records", "duplicates", "rejected")
        return Table((*heads, *counts_of), rows, left=(0, 8))

    def _repr_markdown_(self) -> str:
        return self.table().markdown()

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
        """The identity of its texts, as plain JSON: of each source, [records, SHA-256]
        of its shards in order; of each held-out file, its SHA-256. Of the hashes, the
        first 16 digits, since a checkpoint keeps them all."""
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

    def tokenizer(self) -> TextCoder:
        """The tokenizer that it was made with; UserError if the file is another."""
        tokenizer = folder_tokenizer(self.folder)
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(
                f"the tokenizer in {self.folder} is not the one that the corpus was "
                "made with: put the right one back, or build the corpus again"
            )
        return tokenizer

    def text_tokens(self, source: str) -> int:
        """Tokens of a source's text, without what parts its documents."""
        info = self.sources[source]
        start, end, _ = self.tokenizer().boundaries
        starts = len(info.shards) if start == end else info.documents
        return info.tokens - info.documents - starts

    def targets(self, source: str) -> int:
        """Tokens of a source that are predicted: its text, and each document's EOS."""
        return self.text_tokens(source) + self.sources[source].documents

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
            raise UserError(f"{path} is damaged ({e}): {COPY_AGAIN}") from e
        if len(units) != self.manifest["heldout"][name]["languages"][language]["units"]:
            raise UserError(f"{path} has lost units: build the corpus again")
        return units

    def packed(self, name: str, language: str) -> dict[str, int]:
        """`xz_bytes` of texts of a set by their `text_key`; corpora of former versions
        have none."""
        return dict(self.manifest["heldout"][name]["languages"][language].get("xz", {}))

    def token_counts(self, source: str) -> np.ndarray:
        """int64[V]: how often each token occurs in a source, BOS and EOS included."""
        path = self.folder / "sources" / self._source(source).name / "token_counts.npy"
        try:
            with path.open("rb") as f:
                return np.load(f)
        except OSError as e:
            raise unreadable(path, e) from e
        except ValueError as e:
            raise UserError(f"{path} is damaged ({e}): {COPY_AGAIN}") from e

    def records(self, source: str, retry_seconds: float = 0.0) -> Records:
        """Random access to a source's records, int32[record_tokens + 1] each."""
        rows = self.manifest["sources"][self._source(source).name]["shards"]
        shards = [(str(self.folder / r["file"]), r["records"]) for r in rows]
        m = self.manifest
        sizes = (m["tokenizer"]["vocab_size"], m["record_tokens"] + 1, m["format"])
        return Records(shards, m["dtype"], *sizes, retry_seconds, self.damaged)

    def _source(self, name: str) -> SourceInfo:
        if name not in self.sources:
            raise UserError(
                f"corpus {self.folder} has no source {name!r}; it has "
                f"{', '.join(self.sources)}"
            )
        return self.sources[name]


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
    return Corpus(as_path(cfg.data.corpus), {"record_tokens": size}, sources)


def open_corpus(path: AnyPath, set_aside: bool = False, hashes: bool = False) -> Corpus:
    """Open a corpus folder; checks the manifest and each shard's number of records.

    Args:
      set_aside: list missing and damaged shards in `damaged` instead of raising.
      hashes: read every shard and compare its SHA-256 too.

    Example:
      >>> gx.open_corpus("build/demo-corpus").heldout("udhr", "tr")[0][0]
      '...'

    Raises:
      UserError: no folder, an unfinished build, a broken manifest, a missing shard.
    """
    folder = as_path(path, "corpus ")
    manifest = read_manifest(folder)
    size = (manifest["record_tokens"] + 1) * np.dtype(manifest["dtype"]).itemsize
    listed = sizes_below(folder / "sources") if is_bucket(folder) else None
    sources: dict[str, SourceInfo] = {}
    damaged: dict[str, str] = {}
    for name, s in manifest["sources"].items():
        paths = [folder / row["file"] for row in s["shards"]]
        numbers = (s["documents"], s["bytes"], s["tokens"], s["records"])
        sources[name] = SourceInfo(
            name, s["language"], s["domain"], *numbers, tuple(map(str, paths))
        )
        for shard, row in zip(paths, s["shards"], strict=True):
            try:
                check_shard(shard, row["records"], size, manifest["format"], listed)
                if hashes and file_sha256(shard) != row["sha256"]:
                    raise UserError(
                        f"shard {shard} has another SHA-256 than the manifest says: "
                        f"{COPY_AGAIN}"
                    )
            except UserError as e:
                if not set_aside:
                    raise
                damaged[str(shard)] = str(e)
    return Corpus(folder, manifest, sources, damaged)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus, with all in it that is read elsewhere.

    Raises:
      UserError: see `open_corpus`.
    """
    file = folder / "manifest.json"
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        if is_bucket(folder):
            folder.check_bucket("corpus ")  # type: ignore[attr-defined]
            raise UserError(
                f"there is no corpus in {folder}: build it in a local folder, then "
                f"`gamayun corpus copy FOLDER {folder}`"
            ) from None
        if (folder / ".work").exists():
            raise UserError(
                f"corpus {folder} is unfinished: run the same `gamayun corpus build "
                f"CONFIG --out {folder}` again, it goes on where it was"
            ) from None
        raise UserError(
            f"there is no corpus in {folder}: make it with `gamayun corpus build "
            f"CONFIG --out {folder}`"
        ) from None
    except OSError as e:
        raise unreadable(file, e) from e
    manifest = read_json(file, COPY_AGAIN)
    if manifest.get("format") == 1 and is_bucket(folder):
        raise UserError(
            f"corpus {folder} has ArrayRecord shards (format 1), which are not read "
            "from a bucket: copy it to a disk, or build the corpus again"
        )
    if manifest.get("format") not in SHARDS:
        raise UserError(
            f"{file} has format {manifest.get('format')!r}, this version reads "
            f"{' and '.join(map(str, SHARDS))}: build the corpus again"
        )
    try:
        check_manifest(folder, manifest)
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{file} lacks or contradicts {e}: it was changed by hand or by another "
            "program; build the corpus again"
        ) from e
    return manifest


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or AttributeError for an entry that is lacking or
    cannot be; UserError for a shard outside of the corpus."""
    _ = manifest["recipe"], manifest["tokenizer"]["fingerprint"]
    real = functools.cache(os.path.realpath)
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise KeyError("dtype")
    sizes = [manifest["record_tokens"], manifest["tokenizer"]["vocab_size"]]
    for name, s in manifest["sources"].items():
        _ = s["language"], s["domain"]
        sizes += [s["documents"], s["bytes"], s["tokens"], s["records"]]
        if sum(row["records"] for row in s["shards"]) != s["records"]:
            raise KeyError(f"records of {name}")
        for row in s["shards"]:
            if not is_inside(folder, row["file"], real):
                raise UserError(
                    f"{folder / 'manifest.json'} names a shard outside of the corpus: "
                    f"{row['file']}"
                )
    for held in manifest["heldout"].values():
        sizes += [row["units"] for row in held["languages"].values()]
    if not all(type(n) is int and n >= 0 for n in sizes) or not sizes[0]:
        raise TypeError("its own numbers")
    Corpus(folder, dict(manifest), {}).contents()  # every hash is there


def is_inside(folder: Path, file: str, real: Callable[[str], str]) -> bool:
    """Whether a file of a corpus lies in its folder, wherever links lead; `real` is
    os.path.realpath, which need not be asked for the same folder twice."""
    if is_bucket(folder):  # it has no links
        return not os.path.isabs(file) and ".." not in file.split("/")
    path = str(folder / file)
    parent, name = os.path.split(path)
    if name == ".." or os.path.islink(path):
        parent = path
    return Path(real(parent)).is_relative_to(real(str(folder)))
