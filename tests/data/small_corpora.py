"""Small corpora of random words, for the tests of this room."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import zstandard

from gamayun_jax import config as c
from gamayun_jax.data import build as corpus_build
from gamayun_jax.data.records import with_checksum

ROOT = Path(__file__).parents[2]
ALPHABETS = {
    "en": "abcdefghij klmnop",
    "ru": "абвгдежз иклмн",
    "zh": "天地玄黄宇宙洪荒日月",
}


def some_texts(language, count, seed=0, words=40):
    rng = random.Random(f"{language}{seed}")
    lexicon = [
        "".join(rng.choices(ALPHABETS[language], k=rng.randint(2, 7)))
        for _ in range(150)
    ]
    return [
        " ".join(rng.choices(lexicon, k=rng.randint(3, words))) + f".\n{i} {language}"
        for i in range(count)
    ]


def write_jsonl(path, texts):
    rows = [t if isinstance(t, dict) else {"text": t} for t in texts]
    data = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    elif path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return str(path)


def write_shard(path, records):
    """A flat shard of records: bytes, or arrays of tokens in its own type."""
    data = (r if isinstance(r, bytes) else r.tobytes() for r in records)
    path.write_bytes(b"".join(with_checksum(r, i) for i, r in enumerate(data)))


def make_config(sources, heldout=(), languages=("en", "ru", "zh"), **corpus_fields):
    fields = dict(
        tokenizer=c.TokenizerConfig(400, sample_bytes=30_000),
        record_tokens=32,
        shard_bytes=20_000,
    )
    mixture = c.MixtureConfig("natural")
    return c.Config(
        name="test",
        languages=languages,
        model=c.ModelConfig(400, 1, 8, 1, 1, 8, 8),
        stages=(c.StageConfig("one", 1000, mixture, c.ScheduleConfig()),),
        data=c.DataConfig(seq_len=16),
        corpus=c.CorpusConfig(
            tuple(sources), tuple(heldout), **{**fields, **corpus_fields}
        ),
    )


def three_sources(folder, count=300):
    held = {}
    for language in ("en", "ru"):
        units = [{"id": f"u{i}", "text": f"{language} unit {i}"} for i in range(5)]
        held[language] = write_jsonl(folder / f"held.{language}.jsonl.zst", units)
    texts = {k: some_texts(k, count) for k in ALPHABETS}
    for part in range(3):
        write_jsonl(folder / f"en/{part}.jsonl.gz", texts["en"][part::3])
    return make_config(
        (
            c.SourceConfig("en/web", (str(folder / "en/*.jsonl.gz"),)),
            c.SourceConfig(
                "ru/web", (write_jsonl(folder / "ru.jsonl.zst", texts["ru"]),)
            ),
            c.SourceConfig(
                "zh/books", (write_jsonl(folder / "zh.jsonl", texts["zh"]),)
            ),
        ),
        (c.HeldoutConfig("units", held),),
    )


def one_source(path, **fields):
    return make_config((c.SourceConfig("en/web", (str(path),)),), **fields)


def build(cfg, out, workers=1):
    return corpus_build.build(cfg, out, workers=workers, progress=False)


def tree_hash(folder):
    """One hash of all paths and bytes under a folder, hidden ones included."""
    total = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        total.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def documents_of(built, source):
    """The documents of a source, from its records alone."""
    t = built.tokenizer()
    sizes = [s["records"] for s in built.manifest["sources"][source]["shards"]]
    records = list(built.records(source))
    texts, begin = [], 0
    for size in sizes:
        shard = records[begin : begin + size]
        begin += size
        for a, b in itertools.pairwise(shard):
            assert a[-1] == b[0], "a record's last token is the next one's first"
        targets = np.concatenate([r[1:] for r in shard])
        targets = targets[: sum(t.boundaries.tokens(r) for r in shard)]
        assert shard[0][0] == t.boundaries.start
        ends = np.flatnonzero(targets == t.boundaries.end) + 1
        assert ends[-1] == len(targets)
        for document in np.split(targets, ends[:-1]):
            texts.append(t.decode(document.tolist()))
    return texts
