"""Corpus: nothing lost, nothing twice, the same bytes however it was built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import (
    ROOT,
    build,
    documents_of,
    make_config,
    one_source,
    some_texts,
    tree_hash,
    write_jsonl,
)

from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data import build as corpus_build
from gamayun_jax.data import (
    build_jobs,
    cleaning,
    corpus,
    inputs,
    inspect_corpus,
    tokenizer_training,
)
from gamayun_jax.data.selection import select
from gamayun_jax.data.tokenizer import Tokenizer


def test_records_give_back_the_documents(built):
    cfg, found = built
    for source in cfg.corpus.sources:
        expected = []
        for document in inputs.read_documents(source):
            expected.append(cleaning.clean(document.text))
        texts = documents_of(found, source.name)
        assert texts == expected
        info = found.sources[source.name]
        row = found.manifest["sources"][source.name]
        assert (info.language, info.domain) == tuple(source.name.split("/"))
        assert info.documents == len(texts) == row["documents_read"] == 300
        assert info.bytes == sum(len(t.encode()) for t in texts)
        assert row["characters"] == sum(map(len, texts))
        ids = [found.tokenizer().encode(t) for t in texts]
        assert info.tokens == sum(len(i) + 2 for i in ids)
        counts = np.bincount(np.concatenate(ids), minlength=400)
        counts[[1, 2]] += len(texts)
        assert found.token_counts(source.name).tolist() == counts.tolist()
        assert len(info.shards) > 1
    inspect_corpus.verify(found)


def test_using_a_corpus(built):
    _, found = built
    records = found.records("ru/web")
    assert len(records) == found.sources["ru/web"].records
    assert records[0].dtype == np.int32
    assert records[0].shape == (33,)
    for i in (-1, len(records)):
        with pytest.raises(IndexError):
            records[i]
    again = pickle.loads(pickle.dumps(found)).records("ru/web")
    again = pickle.loads(pickle.dumps(again))
    with ThreadPoolExecutor(8) as pool:
        order = list(range(len(records))) * 4
        random.Random(0).shuffle(order)
        for i, record in zip(order, pool.map(again.__getitem__, order), strict=True):
            assert (record == records[i]).all()
    assert found.examples(16)["ru/web"] == 2 * len(records)
    assert found.heldout_sets() == {"units": ["en", "ru"]}
    assert found.heldout("units", "ru")[1] == ("u1", "ru unit 1")
    for call in (
        lambda: found.examples(5),
        lambda: found.examples(64),
        lambda: found.records("xx/web"),
        lambda: found.token_counts("../x"),
        lambda: found.heldout("units", "zh"),
        lambda: found.heldout("none", "en"),
    ):
        with pytest.raises(UserError):
            call()
    table = inspect_corpus.inspect(found.folder)
    assert "zh/books" in table
    assert "5 units in en ru" in table


def test_no_grain_no_jax_no_tensorflow_at_import():
    code = (
        "import sys, gamayun_jax.data.build; "
        "print({'jax', 'grain', 'tensorflow', 'pyarrow', 'tensorflow_datasets'} "
        "& set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done


def test_workers_and_places_do_not_matter(built, tmp_path):
    cfg, found = built
    for source in (Path(cfg.corpus.sources[1].files[0]).parent,):
        moved = tmp_path / "moved"
        moved.mkdir()
        for path in source.iterdir():
            if path.name != "out":
                (moved / path.name).symlink_to(path)
    build(three_sources_at(cfg, moved), tmp_path / "out", workers=2)
    assert tree_hash(tmp_path / "out") == tree_hash(found.folder)


def three_sources_at(cfg, folder):
    """The same config with its files in another folder."""
    old = str(Path(cfg.corpus.sources[1].files[0]).parent)
    text = c.to_json(cfg).replace(old, str(folder))
    return c.from_json(text)


def test_finished_build_returns_at_once(built):
    cfg, found = built
    before = {p: p.stat().st_mtime_ns for p in found.folder.rglob("*")}
    build(cfg, found.folder)
    assert {p: p.stat().st_mtime_ns for p in found.folder.rglob("*")} == before


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 9),
    st.sampled_from([1, 60, 10_000]),
)
def test_any_documents(built, tmp_path_factory, texts, record_tokens, shard_bytes):
    """documents in == kept + duplicates + rejected; and the kept ones come back."""
    folder = tmp_path_factory.mktemp("any")
    texts = ["one that is always there", *texts]
    cfg = one_source(
        write_jsonl(folder / "a.jsonl", texts),
        record_tokens=record_tokens,
        shard_bytes=shard_bytes,
        tokenizer=c.TokenizerConfig(
            400, model=str(built[1].folder / "tokenizer.model")
        ),
    )
    cfg = dataclasses.replace(cfg, data=c.DataConfig(seq_len=record_tokens))
    found = build(cfg, folder / "out")
    expected = list(dict.fromkeys(t for t in map(cleaning.clean, texts) if t))
    assert documents_of(found, "en/web") == expected
    row = found.manifest["sources"]["en/web"]
    empty = sum(not cleaning.clean(t) for t in texts)
    assert row["rejected"] == ({"empty": empty} if empty else {})
    assert row["documents_read"] == len(texts)
    assert row["duplicates"] == len(texts) - empty - len(expected)
    inspect_corpus.verify(found)


def test_vocabulary_beyond_16_bits_uses_32(tmp_path):
    assert corpus.token_dtype(65_536) == "<u2"
    assert corpus.token_dtype(65_537) == "<u4"
    cfg = one_source(write_jsonl(tmp_path / "a.jsonl", some_texts("en", 50)))
    with pytest.MonkeyPatch.context() as patch:
        for module in (build_jobs, corpus_build):
            patch.setattr(module, "token_dtype", lambda size: "<u4")
        found = build(cfg, tmp_path / "out")
    assert found.manifest["dtype"] == "uint32"
    assert documents_of(found, "en/web") == some_texts("en", 50)


def test_train_tokenizer_is_the_one_of_the_build(built, tmp_path):
    cfg, found = built
    out = corpus_build.train_tokenizer(
        cfg.corpus, tmp_path / "t.model", 1, progress=False
    )
    assert Tokenizer(out).fingerprint == found.tokenizer().fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["t.model"]


def test_sample_is_spread_over_the_source(built, tmp_path):
    cfg, _ = built
    item = inputs.expand(cfg.corpus.sources[1])[0]
    build_jobs.scan(item, tmp_path / "0", 1, 5000)
    files, _ = select(c.CorpusConfig(), [("ru/web", tmp_path / "0")])
    total = int(files[0].bytes.sum())
    sample = list(build_jobs.sample_texts(files, total // 4))
    assert 0.15 < sum(len(t.encode()) for t in sample) / total < 0.35
    numbers = [int(t.split("\n")[1].split()[0]) for t in sample]
    assert min(numbers) < 60
    assert max(numbers) > 240


def test_bad_recipes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts("en", 50))

    def source(name):
        return c.SourceConfig(name, (path,))

    def held(parallel=None, **files):
        return (c.HeldoutConfig("h", files, parallel),)

    two = write_jsonl(tmp_path / "two.jsonl", ["a", "b"])
    three = write_jsonl(tmp_path / "three.jsonl", ["a", "b", "c"])
    named = write_jsonl(
        tmp_path / "n.jsonl", [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}]
    )
    rows = [{"id": i, "text": f"text {k}"} for k, i in enumerate("xyx")]
    twice = write_jsonl(tmp_path / "twice.jsonl", rows)
    broken = write_jsonl(tmp_path / "broken.jsonl", ["a", {"no": 1}])
    blank = write_jsonl(tmp_path / "blank.jsonl", ["a", " "])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    en = (source("en/web"),)
    for cfg, says in (
        (make_config(()), "at least one source"),
        (make_config((*en, *en)), "twice"),
        (make_config((source("en"),)), "<language>/<domain>"),
        (make_config((source("en/../x"),)), "<language>/<domain>"),
        (make_config((source("en/a b"),)), "<language>/<domain>"),
        (make_config((source("xx/web"),)), "not in languages"),
        (make_config(en, held(xx=two)), "not in languages"),
        (make_config(en, held()), "no files"),
        (make_config(en, held(True, en=two, ru=three)), "3 units and en 2"),
        (make_config(en, held(True, en=two, ru=named)), "id 'x' at unit 1"),
        (make_config(en, held(en=twice)), "twice.jsonl:3 has id 'x', as line 1 has"),
        (make_config(en, held(en=broken)), "broken.jsonl:2"),
        (make_config(en, held(en=blank)), "blank.jsonl:2"),
        (make_config(en, held(en=empty)), "empty"),
        (
            make_config(en, held(ru=str(tmp_path / "none.jsonl"))),
            r"^corpus.heldout\['h'\].files\['ru'\]: no file matches .*none.jsonl': "
            r"correct corpus.heldout\['h'\].files\['ru'\]$",
        ),
        (make_config(en, (c.HeldoutConfig("../h", {"en": two}),)), "letters"),
        (make_config(en, (*held(en=two), *held(en=two))), "same name"),
        (make_config(en, record_tokens=24), "multiple of data.seq_len"),
        (make_config(en, tokenizer=c.TokenizerConfig(60_000)), "too large"),
        (make_config(en, tokenizer=c.TokenizerConfig(400, {"de": 1})), "'de'"),
        (make_config(en, tokenizer=c.TokenizerConfig(400, model=path)), "a.jsonl"),
        (make_config(en, min_chars=10_000), "no document left"),
        (one_source(empty), "no documents"),
    ):
        out = tmp_path / hashlib.sha256(says.encode()).hexdigest()[:8] / str(id(cfg))
        with pytest.raises(UserError, match=says) as error:
            build(cfg, out)
        assert "\n" not in str(error.value)
        assert not (out / "manifest.json").exists()


def test_ready_tokenizer_of_another_size(built, tmp_path):
    cfg, found = built
    model = c.TokenizerConfig(500, model=str(found.folder / "tokenizer.model"))
    with pytest.raises(UserError, match="400 pieces"):
        build(one_source(cfg.corpus.sources[2].files[0], tokenizer=model), tmp_path)


def test_damaged_corpora(built, tmp_path):
    _, found = built
    with pytest.raises(UserError, match="gamayun corpus build"):
        corpus.open_corpus(tmp_path / "none")

    def copy(name):
        folder = tmp_path / name
        subprocess.run(["cp", "-r", found.folder, folder], check=True)
        return folder, next(folder.glob("sources/en/web/*0.records"))

    def edit(folder, change):
        path = folder / "manifest.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    folder, _ = copy("json")
    (folder / "manifest.json").write_text('{"format": 1, "sour')
    with pytest.raises(UserError, match="is damaged .* build the corpus again"):
        corpus.open_corpus(folder)
    for key in ("sources", "record_tokens", "dtype", "tokenizer", "heldout", "recipe"):
        folder, _ = copy(f"without-{key}")
        edit(folder, lambda d, key=key: d.pop(key))
        with pytest.raises(UserError, match=key):
            corpus.open_corpus(folder)
    folder, _ = copy("format")
    edit(folder, lambda d: d.update(format=3))
    with pytest.raises(UserError, match="format 3, this version reads 1 and 2"):
        corpus.open_corpus(folder)
    folder, shard = copy("missing")
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        corpus.open_corpus(folder)
    folder, shard = copy("truncated")
    shard.write_bytes(shard.read_bytes()[:-70_000])
    with pytest.raises(UserError, match="damaged|has .* records"):
        corpus.open_corpus(folder)
    folder, shard = copy("flipped")
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="sha256|found"):
        inspect_corpus.verify(corpus.open_corpus(folder))
    folder, _ = copy("other-tokenizer")
    opened = corpus.open_corpus(folder)
    assert opened.tokenizer() is corpus.open_corpus(folder).tokenizer()  # made once
    tokenizer_training.train(
        {"en": ["a b c d"] * 9}, c.TokenizerConfig(267), folder / "tokenizer.model"
    )
    with pytest.raises(UserError, match="is not the one"):
        corpus.open_corpus(folder).tokenizer()
    folder, _ = copy("heldout")
    path = folder / "heldout/units.en.jsonl"
    path.write_text(path.read_text().replace("unit 1", "unit 9"))
    with pytest.raises(UserError, match=r"units\.en"):
        inspect_corpus.verify(corpus.open_corpus(folder))
    path.write_text("")
    with pytest.raises(UserError, match="lost units"):
        corpus.open_corpus(folder).heldout("units", "en")


def test_full_disk_is_said(built, tmp_path, monkeypatch):
    cfg, _ = built

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_build, "scan", full)
    with pytest.raises(UserError, match="No space left"):
        build(cfg, tmp_path / "out")


@pytest.mark.parametrize("what", ["folder", "manifest", "shard", "heldout", "counts"])
def test_what_may_not_be_read_is_not_called_damaged(config, what, monkeypatch):
    """Whoever is told to build again deletes what was whole."""
    folder = Path(config.data.corpus)
    found = corpus.open_corpus(folder)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    place, read = {
        "folder": ((os, "stat"), lambda: corpus.open_corpus(folder)),
        "manifest": ((Path, "read_text"), lambda: corpus.open_corpus(folder)),
        "shard": ((os, "open"), lambda: corpus.open_corpus(folder)),
        "heldout": ((Path, "read_bytes"), lambda: found.heldout("udhr", "tr")),
        "counts": ((np, "load"), lambda: found.token_counts("tr/help")),
    }[what]
    with monkeypatch.context() as m:
        m.setattr(*place, denied, raising=False)
        with pytest.raises(UserError) as e:
            read()
    assert "Permission denied" in str(e.value)
    assert "permissions" in str(e.value)
    assert "build" not in str(e.value)
