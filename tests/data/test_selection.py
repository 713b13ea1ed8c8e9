"""Parallel documents kept in one language each."""

import dataclasses
import hashlib
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from small_corpora import build, documents_of, make_config, tree_hash, write_jsonl

from gamayun_jax import config as c
from gamayun_jax.config import DEMO_CORPUS, UserError
from gamayun_jax.data import inspect_corpus
from gamayun_jax.data.build import train_tokenizer
from gamayun_jax.data.selection import keep_one_language

NAMES = ("en", "ru", "zh")
SOURCES = ("en/hq", "en/web", "ru/web", "zh/web")


def digests(numbers):
    """S16[n] of whole numbers; -1: no id."""
    return np.array(
        [
            b"" if n < 0 else hashlib.blake2b(b"%d" % n, digest_size=16).digest()
            for n in numbers
        ],
        "S16",
    )


def some_documents(seed, count=4000, ids=900):
    """Ids, sources and sizes; the first source shares no ids."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-1, ids, count)
    source = rng.choice(4, count, p=[0.2, 0.4, 0.3, 0.1])
    return np.where(source, numbers, -1), source, rng.integers(10, 1000, count)


@pytest.mark.parametrize("seed", range(3))
def test_every_id_stays_in_one_language_whole(seed):
    numbers, source, sizes = some_documents(seed)
    ids = digests(numbers)
    stays, shared = keep_one_language(ids, source, sizes, SOURCES, seed)
    assert stays[numbers < 0].all()
    language = np.maximum(source, 1)
    several = 0
    for n in range(900):
        mine = numbers == n
        several += len(set(language[mine])) > 1
        chosen = set(language[mine & stays])
        if mine.any():
            assert len(chosen) == 1
            # All documents of the language that has the id.
            assert stays[mine & (language == chosen.pop())].all()
    assert shared == several
    mix = np.random.default_rng(1).permutation(len(ids))
    again, _ = keep_one_language(ids[mix], source[mix], sizes[mix], SOURCES, seed)
    np.testing.assert_array_equal(again, stays[mix])
    turned, _ = keep_one_language(ids, 3 - source, sizes, SOURCES[::-1], seed)
    np.testing.assert_array_equal(turned, stays)
    other, _ = keep_one_language(ids, source, sizes, SOURCES, seed + 9)
    assert (other != stays).any()


def test_languages_keep_the_same_share_of_their_text():
    """Of 40,000 documents of the first and 10,000 of the second, whose ids the first
    has too, and 5,000 of a third with ids of both; the source of no ids is no part."""
    numbers = np.r_[np.arange(40_000), np.arange(10_000), np.arange(5000, 15_000, 2)]
    source = np.repeat([1, 2, 3], [40_000, 10_000, 5000])
    numbers, source = np.r_[numbers, [-1] * 30_000], np.r_[source, [0] * 30_000]
    sizes = np.random.default_rng(0).integers(10, 1000, len(source))
    stays, shared = keep_one_language(digests(numbers), source, sizes, SOURCES, 0)
    assert shared == 12_500
    assert stays[source == 0].all()
    kept = [
        sizes[(source == k) & stays].sum() / sizes[source == k].sum() for k in (1, 2, 3)
    ]
    np.testing.assert_allclose(kept, 40_000 / 55_000, atol=0.02)


@pytest.fixture
def parallel(tmp_path):
    """A config whose languages share a third of their ids, by a field of their own, in
    two files each; and some documents without one."""
    rng = np.random.default_rng(0)
    sources = []
    for language in NAMES:
        ids = rng.choice(300, 100, replace=False)
        rows = [
            {"text": f"{language} page {n} of the manual", "at": {"page": int(n)}}
            for n in ids
        ]
        rows += [{"text": f"{language} letter {n}"} for n in range(20)]
        for part in range(2):
            write_jsonl(tmp_path / language / f"{part}.jsonl", rows[part::2])
        files = (str(tmp_path / language / "*.jsonl"),)
        sources.append(c.SourceConfig(f"{language}/web", files, id_field="at.page"))
    return make_config(
        sources,
        parallel_documents="disjoint",
        tokenizer=c.TokenizerConfig(300, sample_bytes=30_000),
    )


def pages(corpus):
    """Language -> numbers of its pages, from the records alone."""
    texts = {name.split("/")[0]: documents_of(corpus, name) for name in corpus.sources}
    return {
        k: {int(t.split()[2]) for t in of if " page " in t} for k, of in texts.items()
    }


def test_no_page_is_trained_on_in_two_languages(parallel, tmp_path):
    kept = dataclasses.replace(parallel.corpus, parallel_documents="keep")
    whole = build(dataclasses.replace(parallel, corpus=kept), tmp_path / "whole")
    before = pages(whole)
    corpus = build(parallel, tmp_path / "out")
    after = pages(corpus)
    every = set().union(*before.values())
    assert sum(map(len, after.values())) == len(every) < sum(map(len, before.values()))
    assert set().union(*after.values()) == every
    m, told = corpus.manifest, inspect_corpus.inspect(corpus.folder)
    shared = sum(sum(n in of for of in before.values()) > 1 for n in every)
    assert m["disjoint"] == {"seed": 0, "shared_ids": shared}
    assert f"disjoint languages: {shared} ids were in several" in told
    for name, source in m["sources"].items():
        language = name.split("/")[0]
        lost = len(before[language] - after[language])
        assert source["translations"] == lost > 0
        assert source["documents"] == 120 - lost
        assert f"{lost} of {name}" in told
    assert "disjoint" not in whole.manifest
    assert "disjoint" not in inspect_corpus.inspect(whole.folder)
    # The tokenizer alone is the build's.
    train_tokenizer(parallel.corpus, tmp_path / "t.model", 1, progress=False)
    model = (corpus.folder / "tokenizer.model").read_bytes()
    assert (tmp_path / "t.model").read_bytes() == model


def test_workers_do_not_matter_and_the_seed_does(parallel, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        build(parallel, tmp_path / name, workers)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")
    # A finished corpus is known again; with another seed it is another recipe.
    build(parallel, tmp_path / "one")
    other = dataclasses.replace(parallel.corpus, disjoint_seed=1)
    other = dataclasses.replace(parallel, corpus=other)
    with pytest.raises(UserError, match="another recipe"):
        build(other, tmp_path / "one")
    assert pages(build(other, tmp_path / "other")) != pages(
        build(parallel, tmp_path / "one")
    )


def test_without_shared_ids_it_is_refused(parallel, tmp_path):
    sources = tuple(
        dataclasses.replace(s, id_field="id") for s in parallel.corpus.sources
    )
    corpus = dataclasses.replace(parallel.corpus, sources=sources)
    with pytest.raises(UserError, match=r"no document has the id of one .*id_field"):
        build(dataclasses.replace(parallel, corpus=corpus), tmp_path / "out")


def test_ids_of_a_table(parallel, tmp_path):
    """Parquet, with the id inside of a struct, makes the same choice."""
    corpus = build(parallel, tmp_path / "lines")
    sources = []
    for source in parallel.corpus.sources:
        folder = tmp_path / f"{source.language}-table"
        folder.mkdir()
        for part in range(2):
            text = (tmp_path / source.language / f"{part}.jsonl").read_text("utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            table = pyarrow.Table.from_pylist(
                [{"text": r["text"], "at": r.get("at")} for r in rows]
            )
            pyarrow.parquet.write_table(table, folder / f"{part}.parquet")
        files = (str(folder / "*.parquet"),)
        sources.append(dataclasses.replace(source, files=files))
    cfg = dataclasses.replace(parallel.corpus, sources=tuple(sources))
    table = build(dataclasses.replace(parallel, corpus=cfg), tmp_path / "table")
    assert pages(table) == pages(corpus)


def test_embedded_pages_share_their_paths():
    """As docs/data.md says: of Turkish pages, more than a third are there in English
    under the same path."""
    ids = {}
    for language in ("en", "tr"):
        path = DEMO_CORPUS / f"train/{language}.help.jsonl.zst"
        with zstandard.open(path, "rb") as f:
            rows = map(json.loads, io.TextIOWrapper(f, encoding="utf-8"))
            ids[language] = {row["path"] for row in rows}
    assert len(ids["en"] & ids["tr"]) > len(ids["tr"]) / 3
