"""Corpus: nothing lost, nothing twice, the same bytes however it was built."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data import build as corpus_build
from gamayun_jax.data import (
    build_jobs,
    cleaning,
    contamination,
    corpus,
    documents,
    files,
    heldout_sets,
    inputs,
    inspect_corpus,
    records,
    text_files,
    tokenizer_training,
    worker_pool,
)
from gamayun_jax.data.contamination import Contamination
from gamayun_jax.data.tokenizer import Tokenizer

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
        stream = np.concatenate([*(r[:-1] for r in shard), shard[-1][-1:]])
        stream = stream[stream != t.pad_id]
        starts = np.flatnonzero(stream == t.bos_id)
        for document in np.split(stream, starts)[1:]:
            assert document[-1] == t.eos_id
            texts.append(t.decode(document.tolist()))
    return texts


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    cfg = three_sources(folder)
    return cfg, build(cfg, folder / "out")


# ------------------------------------------------------------------ the result


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


def test_duplicates_and_held_out(tmp_path):
    e_composed, e_combining = "caf\u00e9 au lait", "cafe\u0301 au\u00ad lait  "
    first = write_jsonl(tmp_path / "1.jsonl", [e_composed, "a b c", "HELD out"])
    second = write_jsonl(tmp_path / "2.jsonl", ["new", "a b c ", e_combining, "new"])
    held = write_jsonl(tmp_path / "h.jsonl", ["HELD\u200b out"])
    cfg = make_config(
        (c.SourceConfig("en/a", (first,)), c.SourceConfig("en/b", (second,))),
        (c.HeldoutConfig("h", {"en": held}, parallel=False),),
        tokenizer=c.TokenizerConfig(270),
    )
    found = build(cfg, tmp_path / "out")
    assert documents_of(found, "en/a") == [e_composed, "a b c"]
    assert documents_of(found, "en/b") == ["new"]
    a, b = (found.manifest["sources"][k] for k in ("en/a", "en/b"))
    assert (a["duplicates"], a["rejected"]) == (0, {"held out": 1})
    assert (b["duplicates"], b["rejected"]) == (3, {})
    assert found.heldout("h", "en") == [("0", "HELD out")]


PROSE = {
    "en": "Nobody knows why the lighthouse keeper painted his boat in {} colours.",
    "ru": "Никто не знает, зачем смотритель маяка покрасил лодку в {} цветов.",
    "zh": "没有人知道灯塔看守人为什么把他的小船漆成了{}种不同的颜色。",
}


@pytest.mark.parametrize("mode", ["remove", "report"])
@pytest.mark.parametrize("language", ["en", "ru", "zh"])
def test_held_out_sentences_inside_of_documents(tmp_path, language, mode):
    """In another case, over a line's end, with other signs, or nearly the same."""
    unit = PROSE[language].format(7)
    short = {"en": "Good night!", "ru": "Добрый вечер!", "zh": "晚上好！"}[language]
    other = some_texts(language, 80)
    around = [" ".join(other[i : i + 9]) for i in range(0, 45, 9)]
    gap = "" if language == "zh" else " "
    half = len(unit) // 2
    near = unit.replace("lighthouse", "light-house").replace("小船", "小艇")
    holding = [
        f"{around[0]}{gap}{unit}{gap}{around[1]}",
        f"{around[1]}\n{unit.upper()}",
        f"{around[2]} «{unit[:half]}\n{unit[half:].rstrip('.。')}»! {around[0]}",
        f"{around[3]} {near.replace('лодку', 'барку')} {around[4]}",
        short.upper().replace("!", "").replace("！", ""),
    ]
    innocent = [
        unit[: len(unit) // 3] + around[0],
        f"{around[1]} {short} {around[2]}",
        *other[50:],
    ]
    held = [{"id": "a", "text": unit}, {"id": "b", "text": short}]
    source = f"{language}/web"
    cfg = make_config(
        (
            c.SourceConfig(
                source, (write_jsonl(tmp_path / "a.jsonl", [*innocent, *holding]),)
            ),
        ),
        (
            c.HeldoutConfig("h", {language: write_jsonl(tmp_path / "h.jsonl", held)}),
            c.HeldoutConfig(
                "other", {language: write_jsonl(tmp_path / "o.jsonl", other[:1])}
            ),
        ),
        held_out_copies=mode,
        tokenizer=c.TokenizerConfig(320),
    )
    found = build(cfg, tmp_path / "out")
    row = found.manifest["sources"][source]
    assert row["held_out"] == {"h": 5, "other": 3}
    removed = mode == "remove"
    also = [i for i in innocent if other[0] in i]
    assert len(also) == 1
    expected = (
        [i for i in innocent if i not in also] if removed else [*innocent, *holding]
    )
    assert documents_of(found, source) == expected
    assert row["rejected"] == ({"held out": 6} if removed else {})
    lines = (tmp_path / f"out/rejected/{language}.web.jsonl").read_text().split("\n")
    rejected = [json.loads(line) for line in lines if line]
    assert {r["reason"] for r in rejected} == {
        "held out" if removed else "held out, kept"
    }
    assert [r["detail"] for r in rejected].count("h: a") == 4
    told = inspect_corpus.inspect(tmp_path / "out")
    done = "removed" if removed else "reported, not removed"
    assert f"5 documents with its texts {done}: 5 of {source}" in told
    assert "1 of 2 texts are too short" in told


def test_any_held_out_text_is_found_inside_of_any(monkeypatch):
    """Whatever the place, the language and what is compared at a time."""
    rng = random.Random(0)
    held = {k: [t.split("\n")[0] for t in some_texts(k, 30, seed=5)] for k in ALPHABETS}
    units = [(f"{k}{i}", t) for k, v in held.items() for i, t in enumerate(v)]
    finder = Contamination("h", units)
    texts = []
    for _, unit in units:
        a, b = (
            some_texts(rng.choice(sorted(ALPHABETS)), 1, rng.random())[0] for _ in "ab"
        )
        texts.append(f"{a} {unit.swapcase()} {b}")
    alone = [finder.judge([t])[0] for t in texts]
    assert finder.judge(texts) == alone
    monkeypatch.setattr(contamination, "MOST_MATCHES", 5)  # a few at a time
    assert finder.judge(texts) == alone
    long = [k for k, (_, t) in enumerate(units) if len(t.replace(" ", "")) > 32]
    assert len(long) > 60
    # A table of numbers holds no other table's text.
    digits = Contamination("d", [("1", "12 34 56 78 90 " * 5)])
    assert digits.judge(["98 76 54 32 10 " * 9]) == [[]]
    for k in long:
        assert units[k][0] in [u.id for u in alone[k]]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_parts_of_a_held_out_text_are_found(language):
    """A source may have a held-out document's lines as documents of their own."""
    *lines, other = [t.split("\n")[0] for t in some_texts(language, 41, words=16)]
    finder = Contamination("h", [("page", "\n".join(lines))])
    dense = language == "zh"
    count = [len(t.replace(" ", "")) for t in lines]
    long = [t for t, n in zip(lines, count, strict=True) if n >= (24 if dense else 48)]
    assert len(long) > 10
    assert all(finder.judge(long))
    assert all(finder.judge([" ".join(lines[k : k + 3]) for k in range(30)]))
    # A line in a text of its own, and a text of its own.
    assert finder.judge([f"{other} {long[0]} {other[::-1] * 3}", other]) == [[], []]


def test_a_template_of_many_held_out_texts_takes_no_time():
    """A benchmark's questions all begin alike, and each is found as often."""
    begin = "The following are multiple choice questions about philosophy and science. "
    rng = random.Random(0)
    units = [(str(i), begin + rng.randbytes(20).hex()) for i in range(40_000)]
    finder = Contamination("h", units)
    start = time.monotonic()
    (found,) = finder.judge([begin])
    assert len(found) == len(units)
    assert time.monotonic() - start < 10  # a second; 45 s if it grows as the square
    # Nor does it take the memory of all documents' matches together.
    texts = [begin[:50] + rng.choice("xyz") * 200 + f" {i}" for i in range(80)]
    tracemalloc.start()
    assert finder.judge(texts) == [[]] * 80
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250_000_000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("*.jsonl", '{"text": "a"}', "no single file: give one"),
        (
            "h.jsonl",
            '{"id": 1, "text": "a"}\n{"text": "b"}',
            "2 has no id, so its number",
        ),
        ("h.jsonl", '{"txt": "a"}', r"1: no text \(no field 'text'; there are: txt\)"),
        ("h.jsonl", "", "is empty"),
    ],
)
def test_held_out_files_that_cannot_be(tmp_path, name, content, says):
    (tmp_path / "h.jsonl").write_text(content)
    sets = (c.HeldoutConfig("h", {"en": str(tmp_path / name)}),)
    with pytest.raises(
        UserError, match=rf"^corpus.heldout\['h'\].files\['en'\].*{says}"
    ):
        heldout_sets.read_heldout(make_config((), sets).corpus)


def test_held_out_files_of_a_folder_s_present_corpus(tmp_path):
    """Not those of the one that was there before, in the same process."""
    texts = some_texts("en", 200)
    source = c.SourceConfig("en/web", (write_jsonl(tmp_path / "a.jsonl", texts),))
    for first, last in ((5, 6), (6, 8)):
        held = write_jsonl(tmp_path / "h.jsonl", texts[first:last])
        cfg = make_config((source,), (c.HeldoutConfig("h", {"en": held}),))
        found = build(cfg, tmp_path / "out")
        assert documents_of(found, "en/web") == texts[:first] + texts[last:]
        shutil.rmtree(tmp_path / "out")


def parallel_units(count=40, change=lambda rows: rows):
    rng = random.Random(1)
    lengths = [rng.randint(3, 60) for _ in range(count)]
    return {
        k: change(
            [
                {"id": str(i), "text": f"{k} {i} " + "ab " * n}
                for i, n in enumerate(lengths)
            ]
        )
        if k == "ru"
        else [
            {"id": str(i), "text": f"{k} {i} " + "xyz " * n}
            for i, n in enumerate(lengths)
        ]
        for k in ("en", "ru")
    }


@pytest.mark.parametrize(
    ("change", "given", "parallel", "warns"),
    [
        (lambda rows: rows, None, True, ""),
        (
            lambda rows: rows[::-1],
            None,
            False,
            "not parallel, since ru has id '39' at unit 1, where en has '0'",
        ),
        (lambda rows: rows[:-1], None, False, "ru has 39 units and en 40"),
        (lambda rows: [r["text"] for r in rows], None, False, "units without an id"),
        (lambda rows: [r["text"] for r in rows][::-1], None, False, "without an id"),
        (lambda rows: rows, False, False, ""),
        # The right ids on the wrong texts: only lengths tell.
        (
            lambda rows: [
                {**r, "text": s["text"]} for r, s in zip(rows, rows[::-1], strict=True)
            ],
            None,
            True,
            "WARNING: units of ru and of the first language",
        ),
    ],
)
def test_parallel_is_what_has_the_same_ids(tmp_path, change, given, parallel, warns):
    held = {
        k: write_jsonl(tmp_path / f"{k}.jsonl", rows)
        for k, rows in parallel_units(change=change).items()
    }
    sources = (
        c.SourceConfig(
            "en/web", (write_jsonl(tmp_path / "a.jsonl", some_texts("en", 60)),)
        ),
    )
    cfg = make_config(
        sources,
        (c.HeldoutConfig("h", held, given),),
        tokenizer=c.TokenizerConfig(300),
    )
    found = build(cfg, tmp_path / "out")
    assert found.manifest["heldout"]["h"]["parallel"] is parallel
    told = inspect_corpus.inspect(tmp_path / "out")
    assert warns in told
    assert ("WARNING: units" in told or "not parallel, since" in told) == bool(warns)
    assert ("(not parallel)" in told) != parallel


def test_parallel_on_purpose_needs_no_ids(tmp_path):
    held = {
        k: write_jsonl(tmp_path / f"{k}.jsonl", [r["text"] for r in rows])
        for k, rows in parallel_units().items()
    }
    for told, parallel in ((True, True), (None, False)):
        cfg = make_config((), (c.HeldoutConfig("h", held, told),))
        (one,) = heldout_sets.read_heldout(cfg.corpus)
        assert (one.name, one.parallel) == ("h", parallel)


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
    files = build_jobs.select([("ru/web", tmp_path / "0")])
    total = int(files[0].bytes.sum())
    sample = list(build_jobs.sample_texts(files, total // 4))
    assert 0.15 < sum(len(t.encode()) for t in sample) / total < 0.35
    numbers = [int(t.split("\n")[1].split()[0]) for t in sample]
    assert min(numbers) < 60
    assert max(numbers) > 240


# ------------------------------------------------------------------ restart

BUILD = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
from gamayun_jax import config
from gamayun_jax.data import build
cfg = config.from_json(Path(sys.argv[1]).read_text())
build.build(cfg, Path(sys.argv[2]), workers=int(sys.argv[3]), progress=False)
"""


def start_build(cfg, tmp_path, out, workers=2):
    (tmp_path / "config.json").write_text(c.to_json(cfg))
    command = [sys.executable, "-c", BUILD, tmp_path / "config.json", out, str(workers)]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def children_of(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def all_end(pids, seconds=10):
    """Whether the processes end (one that nobody waits for counts as ended)."""

    def runs(pid):
        try:
            return (
                Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
            )
        except OSError:
            return False

    for _ in range(seconds * 100):
        if not any(map(runs, pids)):
            return True
        time.sleep(0.01)
    return False


def kill_at_points(built, tmp_path, points, workers):
    """SIGKILL a build again and again, later each time; then let it finish."""
    cfg, found = built
    out = tmp_path / "out"
    killed = 0
    for count in points:
        process = start_build(cfg, tmp_path, out, workers)
        children = []
        while process.poll() is None:
            # os.walk doesn't mind folders that vanish while it looks.
            if sum(len(d) + len(f) for _, d, f in os.walk(out)) >= count:
                children = children_of(process.pid)
                process.kill()
                killed += 1
                break
            time.sleep(0.001)
        process.communicate()
        assert all_end(children), "workers outlive a killed build"
        if not (out / "manifest.json").exists() and (out / ".work").exists():
            with pytest.raises(UserError, match="unfinished"):
                corpus.open_corpus(out)
    build(cfg, out)
    assert tree_hash(out) == tree_hash(found.folder)
    return killed


def test_killed_build_goes_on(built, tmp_path):
    assert kill_at_points(built, tmp_path, [3, 30, 55], workers=2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_many_points(built, tmp_path, workers):
    rng = random.Random(workers)
    points = sorted(rng.choices(range(1, 120), k=25))
    assert kill_at_points(built, tmp_path, points, workers) >= 8


def test_finished_shards_are_not_done_again(built, tmp_path, monkeypatch):
    cfg, found = built
    calls = []
    tokenise = build_jobs.tokenise

    def fails_at_third(*args):
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tokenise(*args)

    monkeypatch.setattr(corpus_build, "tokenise", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(cfg, tmp_path / "out")
    done = {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*.arrayrecord")}
    assert len(done) == 2
    monkeypatch.setattr(corpus_build, "tokenise", tokenise)
    build(cfg, tmp_path / "out")
    assert {p: p.stat().st_ino for p in done} == done
    assert tree_hash(tmp_path / "out") == tree_hash(found.folder)


def test_ctrl_c_is_clean(built, tmp_path):
    cfg, found = built
    out = tmp_path / "out"
    process = start_build(cfg, tmp_path, out)
    while not list(out.glob(".work/scan/*")) and process.poll() is None:
        time.sleep(0.002)
    children = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1  # the parent's own, which the CLI catches
    assert "KeyboardInterrupt" in errors
    assert all_end(children)
    build(cfg, out)
    assert tree_hash(out) == tree_hash(found.folder)


def test_dead_worker_is_said():
    with worker_pool.Pool(2) as pool:
        with pytest.raises(UserError, match="worker process"):
            list(pool.run(os._exit, [(3,)]))


def test_another_recipe_is_refused(built, tmp_path):
    cfg, found = built
    other = dataclasses.replace(
        cfg, corpus=dataclasses.replace(cfg.corpus, min_chars=2)
    )
    with pytest.raises(UserError, match="another recipe"):
        build(other, found.folder)
    # What decides whether there is a corpus, not which, may change.
    looser = dataclasses.replace(cfg.corpus, max_bad_share=0.5)
    build(dataclasses.replace(cfg, corpus=looser), found.folder)
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "recipe.json").write_text('{"recipe": "x"}')
    with pytest.raises(UserError, match="unfinished one of another recipe"):
        build(cfg, tmp_path / "out")
    (tmp_path / "mine" / "sources").mkdir(parents=True)
    with pytest.raises(UserError, match="no corpus"):
        build(cfg, tmp_path / "mine")


def test_changed_input_is_another_recipe(tmp_path):
    path = tmp_path / "a.jsonl"
    cfg = one_source(write_jsonl(path, some_texts("en", 30)))
    cfg = dataclasses.replace(
        cfg,
        corpus=dataclasses.replace(cfg.corpus, tokenizer=c.TokenizerConfig(290)),
    )
    build(cfg, tmp_path / "out")
    data = bytearray(path.read_bytes())
    data[12] ^= 1  # same size
    path.write_bytes(data)
    with pytest.raises(UserError, match="another recipe"):
        build(cfg, tmp_path / "out")


def test_two_builds_of_a_folder(built, tmp_path):
    cfg, _ = built
    with files.lock(tmp_path):
        with pytest.raises(UserError, match="another process"):
            build(cfg, tmp_path)


# ------------------------------------------------------------------ reading


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.text("ae\u0301\u00ad\u200b\ufeff \t\n\r\0\x85\u1100\u1161\u11a8"),
        st.text("a\u0e01\u0e38\u0e48\u0301\u0327\u0334\u00ad\u200b \x0c\u2028"),
    )
)
@example("e\u00ad\u0301")
def test_clean(text):
    found = cleaning.clean(text)
    assert cleaning.clean(found) == found
    assert unicodedata.is_normalized("NFC", found)
    assert not cleaning.DROPPED.search(found)
    for line in found.split("\n"):
        assert line == line.rstrip(" \t")
    assert found == found.strip("\n")


def test_clean_keeps_what_matters():
    assert (
        cleaning.clean("\n  def f():\r\n\treturn  1 \t\n\n")
        == "  def f():\n\treturn  1"
    )
    assert cleaning.clean("می\u200cخواهم 👩\u200d👩") == "می\u200cخواهم 👩\u200d👩"


def test_clean_does_not_glue_words():
    for mark in "\f\v\x1c\x1d\x1e\x85\u2028\u2029":  # \f: a page of pdftotext ends
        assert cleaning.clean(f"last{mark}first") == "last\nfirst"
    assert cleaning.clean("a\x1fb \f\n c") == "a b\n\n c"
    # Thai, Lao, Burmese and Khmer mark words with it; elsewhere it is a break that
    # may be, within a word.
    for words in ("ฉัน\u200bรัก", "ຂ້ອຍ\u200bຮັກ", "ကျွန်\u200bတော်", "ខ្ញុំ\u200bស្រលាញ់"):
        assert cleaning.clean(words) == unicodedata.normalize("NFC", words)
    assert cleaning.clean("super\u200bcali, \u200bfragi") == "supercali, fragi"


@settings(max_examples=100, deadline=None)
@given(
    st.text("a\u0301\u0316\u0327\u0344\u0f73\uff9e\u1100\u1161\u00e9", min_size=30),
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]),
)
@example("\u0344\u0316" * 40, "NFC")
@example("\uff9e\u0316" * 40, "NFKC")
def test_normal_forms_are_unicode_s(text, form):
    """Marks that are sorted before come out as if they had not been."""
    for times in (1, 3):
        expected = unicodedata.normalize(form, text * times)
        assert cleaning.normal_form(form, text * times) == expected


TEXTS = ["первый", "second\nline", "三", " \t 4 "]


def read(*files, **fields):
    return list(
        inputs.read_documents(
            c.SourceConfig("en/web", tuple(map(str, files)), **fields)
        )
    )


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl(tmp_path, end):
    rows = [{"id": i, "body": t} for i, t in enumerate(TEXTS)]
    found = read(write_jsonl(tmp_path / f"a.{end}", rows), text_field="body")
    assert [d.text for d in found] == TEXTS
    assert [(d.id, d.line, d.file) for d in found][2] == ("2", 3, f"a.{end}")


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfa\r\n\r\n b\n", b"a\n\n b"])
def test_txt(tmp_path, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw) + gzip.compress(b"c"))
    frames = zstandard.compress(raw) + zstandard.compress(b"c")
    (tmp_path / "c.txt.zst").write_bytes(frames)
    last = "b" if raw.endswith(b"\n") else "bc"
    tail = ["c"] if raw.endswith(b"\n") else []
    assert [d.text for d in read(tmp_path / "a.txt")] == ["a", " b"]
    for name in ("b.txt.gz", "c.txt.zst"):  # members and frames follow each other
        assert [d.text for d in read(tmp_path / name)] == ["a", f" {last}", *tail]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": [*TEXTS, None], "id": list("abcde"), "x": [1] * 5})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [d.text for d in found[:4]] == TEXTS
    assert found[1].id == "b"
    assert found[4].reason == "no text"
    assert [b.reason for b in read(tmp_path / "a.parquet", text_field="no")] == [
        "no text"
    ] * 5
    (number,) = {b.reason for b in read(tmp_path / "a.parquet", text_field="x")}
    assert number == "text is not a string"


def nested_rows():
    return [
        {"t": {"ru": f"строка {i}", "en": f"row {i}"}, "id": f"u{i}"} for i in range(3)
    ]


@pytest.mark.parametrize("field", ["t.ru", "t/ru"])
@pytest.mark.parametrize("end", ["json", "parquet"])
def test_nested_fields(tmp_path, field, end):
    path = tmp_path / f"a.{end}"
    if end == "json":
        write_jsonl(
            path, [*nested_rows(), {"t": {"en": "alone"}}, {"t": 7, "t.ru": "x"}]
        )
    else:
        rows = [*nested_rows(), {"t": {"en": "alone"}}, {"t": None}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(path, text_field=field)
    assert [d.text for d in found[:3]] == ["строка 0", "строка 1", "строка 2"]
    assert found[1].id == "u1"
    assert found[3].reason == "no text"
    # A key that has a dot in its own name comes before a path.
    assert getattr(found[4], "text", None) == (
        "x" if (field, end) == ("t.ru", "json") else None
    )


@pytest.mark.parametrize("end", ["json", "parquet"])
def test_a_missing_field_lists_those_there_are(tmp_path, end):
    path = tmp_path / f"a.{end}"
    if end == "json":
        write_jsonl(path, nested_rows())
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested_rows()), path)
    with pytest.raises(
        UserError, match=r"no field 'text'.*: t\.(en|ru), t\.(en|ru), id"
    ):
        build(one_source(path), tmp_path / "out")


def test_any_key_and_any_file_name(tmp_path):
    """Lone surrogates in them, which have no bytes in UTF-8, and line ends."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"\\ud800 a\\nb": "x"}\n')
    with pytest.raises(UserError, match="no field 'text'") as error:
        build(one_source(path), tmp_path / "out")
    assert "there are: \\ud800 a\\nb)" in str(error.value)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.jsonl")).write_text("{}")
    with pytest.raises(UserError, match=r"the name of .*b\\udcff.jsonl.*not UTF-8"):
        read(f"{tmp_path}/b*.jsonl")


@pytest.mark.parametrize("end", ["json.gz", "json.zst", "ndjson", "json"])
def test_names_of_json_lines(tmp_path, end):
    """c4-train.00000-of-01024.json.gz, Dolma's and others' names."""
    path = write_jsonl(tmp_path / f"c4.00000-of-01024.{end}", TEXTS)
    assert [d.text for d in read(path)] == TEXTS


def invalid_utf8(texts, at):
    """A string column of which row `at` is not UTF-8."""
    raw = pyarrow.array([t.encode() for t in texts[:at]] + [b"caf\xe9"] + [
        t.encode() for t in texts[at + 1 :]
    ])  # fmt: skip
    return pyarrow.StringArray.from_buffers(len(raw), *raw.buffers()[1:])


def test_one_bad_row_of_parquet_costs_one_row(tmp_path):
    texts = some_texts("en", 2000)
    table = pyarrow.table({"text": invalid_utf8(texts, 300)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = build(one_source(tmp_path / "a.parquet"), tmp_path / "out")
    row = found.manifest["sources"]["en/web"]
    assert (row["documents_read"], row["documents"]) == (2000, 1999)
    assert row["rejected"] == {"not UTF-8": 1}
    assert row["damaged"] == []
    (rejected,) = (tmp_path / "out/rejected/en.web.jsonl").read_text().splitlines()
    assert json.loads(rejected)["line"] == 301
    # Inside of another column, and beside an id that Python has no value for.
    inner = pyarrow.StructArray.from_arrays([invalid_utf8(TEXTS, 2)], ["ru"])
    ids = pyarrow.array([1, 2**62, 3, 4], pyarrow.timestamp("us"))
    table = pyarrow.table({"t": inner, "id": ids})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", store_schema=False)
    reasons = [
        getattr(d, "reason", "")
        for d in read(tmp_path / "b.parquet", text_field="t.ru")
    ]
    assert reasons == ["", "", "not UTF-8", ""]


def test_two_columns_of_one_name(tmp_path):
    column = pyarrow.array(TEXTS)
    table = pyarrow.Table.from_arrays([column, column], ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"en/web.*a\.parquet has 2 columns named 'text'"
    ):
        read(tmp_path / "a.parquet")
    table = pyarrow.Table.from_arrays([column] * 3, ["text", "id", "id"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert [d.text for d in read(tmp_path / "b.parquet")] == TEXTS


def cut_gz(path, texts):
    data = Path(write_jsonl(path.with_suffix(".jsonl.gz"), texts)).read_bytes()
    path.with_suffix(".jsonl.gz").write_bytes(data[: len(data) // 2])
    return path.with_suffix(".jsonl.gz"), None


def damaged_group(path, texts):
    """The second of four groups of rows has other bytes in it."""
    path = path.with_suffix(".parquet")
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=500, use_dictionary=False)
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    begin = chunk.data_page_offset
    data[begin : begin + 400] = bytes(400)
    path.write_bytes(data)
    return path, 500


@pytest.mark.parametrize("damage", [cut_gz, damaged_group])
def test_a_damaged_file_is_no_small_matter(tmp_path, damage, capsys):
    """However little of it is bad documents: it stops the build, or is told."""
    texts = some_texts("en", 2000)
    path, unread = damage(tmp_path / "a", texts)
    whole = write_jsonl(tmp_path / "b.jsonl", some_texts("en", 300, seed=1))
    cfg = one_source(path)
    cfg = make_config((c.SourceConfig("en/web", (str(path), whole)),))
    out = tmp_path / "out"
    says = rf"1 of its files damaged, first {path.name}: .* after document \d+, .*not"
    with pytest.raises(UserError, match=f"{says} read .*on_damaged_file"):
        build(cfg, out)
    assert not (out / "manifest.json").exists()
    fields = dataclasses.replace(cfg.corpus, on_damaged_file="keep_readable")
    found = corpus_build.build(dataclasses.replace(cfg, corpus=fields), out, workers=1)
    row = found.manifest["sources"]["en/web"]
    (told,) = row["damaged"]
    assert (told["file"], told["unread"]) == (path.name, unread)
    kept = documents_of(found, "en/web")
    assert len(kept) == row["documents_read"] == row["documents"]
    first = told["after"]
    assert kept[:first] == texts[:first]
    if unread:  # the groups after the damaged one are there
        assert kept[500:1500] == texts[1000:]
        assert len(kept) == 1500 + 300
    else:
        assert 500 < len(kept) == first + 300
    assert f"DAMAGED: en/web {path.name}" in capsys.readouterr().err
    assert f"DAMAGED: en/web {path.name}" in inspect_corpus.inspect(out)


def test_a_file_system_s_fault_is_no_damage(tmp_path, monkeypatch):
    """It may be gone when the build is run again, so it is not kept as a result."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", fails)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: Input/output"):
        read(path)


def test_globs_are_sorted_and_files_come_once(tmp_path):
    for name in ("2024/b", "2024/a", "2025/a", "x[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    found = read(f"{tmp_path}/**/a.jsonl", f"{tmp_path}/2024/*.jsonl")
    assert [d.text for d in found] == ["2024/a", "2025/a", "2024/b"]
    assert found[0].file == "2024/a.jsonl"
    assert [d.text for d in read(tmp_path / "x[1].jsonl")] == ["x[1]"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("{}/none*.jsonl",), "no file matches"),
        (("{}/a.csv",), "of no kind"),
        (("{}/a.parquet.gz",), "of no kind"),
        (("{}/folder.jsonl",), "not a file"),
        ((), "has no files"),
        (("tfds:{}",), "not tfds:FOLDER:SPLIT"),
        (("tfds:{}/none:train",), "cannot be opened"),
    ],
)
def test_bad_paths(tmp_path, files, says):
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.parquet.gz").touch()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=says) as error:
        read(*(f.format(tmp_path) for f in files))
    assert "en/web" in str(error.value)


def test_bad_lines_are_counted_named_and_copied(tmp_path):
    good = some_texts("en", 200)
    bad = {
        b"{not json": "not JSON",
        b'{"text": "cut': "not JSON",
        b"[" * 100_000: "not JSON",
        b'"a string"': "not a JSON object",
        b'{"txt": "no field"}': "no text",
        b'{"text": null}': "no text",
        b'{"text": 7}': "text is not a string",
        b'{"text": ["a"]}': "text is not a string",
        b'{"text": "\\ud800 alone"}': "lone surrogates",
        b'{"text": "\xff\xfe"}': "not UTF-8",
        '{"text": "UTF-16"}'.encode("utf-16"): "not UTF-8",
        b'{"text": " \\n\\u0000"}': "empty",
        b'{"text": "ab"}': "too short",
    }
    with open(write_jsonl(tmp_path / "a.jsonl", good), "ab") as f:
        f.write(b"\n".join(bad) + b"\n")
    cfg = one_source(tmp_path / "a.jsonl", max_bad_share=0.1, min_chars=3)
    found = build(cfg, tmp_path / "out")
    assert documents_of(found, "en/web") == good
    row = found.manifest["sources"]["en/web"]
    expected = {r: list(bad.values()).count(r) for r in sorted(set(bad.values()))}
    assert row["rejected"] == expected
    with open(tmp_path / "out/rejected/en.web.jsonl") as f:
        rejected = [json.loads(line) for line in f]
    assert [r["reason"] for r in rejected] == list(bad.values())
    assert [r["line"] for r in rejected] == list(range(201, 201 + len(bad)))
    assert rejected[0]["file"] == "a.jsonl"
    assert rejected[0]["text"] == "{not json"
    # The same with a smaller limit is an error that names the first.
    strict = dataclasses.replace(
        cfg, corpus=dataclasses.replace(cfg.corpus, max_bad_share=0.01)
    )
    with pytest.raises(UserError, match=r"11 of 213 .*a\.jsonl:201: not JSON") as e:
        build(strict, tmp_path / "strict")
    assert "\n" not in str(e.value)
    assert (tmp_path / "strict/rejected/en.web.jsonl").exists()
    # Short and empty ones are no sign of broken input.
    many = [*some_texts("en", 150), *[" ", "a"] * 40]
    cfg = one_source(write_jsonl(tmp_path / "b.jsonl", many), min_chars=3)
    row = build(cfg, tmp_path / "b").manifest["sources"]["en/web"]
    assert row["rejected"] == {"empty": 40, "too short": 40}


@pytest.mark.parametrize("end", ["gz", "zst"])
def test_truncated_and_corrupt_streams(tmp_path, end):
    path = tmp_path / f"a.jsonl.{end}"
    texts = some_texts("en", 3000, words=200)
    whole = Path(write_jsonl(path, texts)).read_bytes()
    for size in (0, 1, 5, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        *found, last = read(path)
        assert isinstance(last, documents.Damage)
        assert last.reason in ("truncated file", "corrupt file")
        assert [d.text for d in found] == texts[: len(found)]
        assert last.line == len(found) + 1
    assert len(found) > 1500
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(2000) + whole[middle + 2000 :])
    assert read(path)[-1].reason == "corrupt file"
    path.write_bytes(b'{"text": "not compressed"}\n' * 9)
    assert [b.reason for b in read(path)] == ["corrupt file"]
    # A source that is cut in half is not silently half a source.
    path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="corrupt file"):
        build(one_source(path), tmp_path / "out")


def test_broken_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = some_texts("en", 2000)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    whole = path.read_bytes()
    for data in (b"", b"PAR1", b'{"text": 1}\n', whole[: len(whole) // 2]):
        path.write_bytes(data)
        assert [b.reason for b in read(path)] == ["corrupt file"]
    path.write_bytes(whole[:50] + bytes(5000) + whole[5050:])
    assert read(path)[-1].reason == "corrupt file"


@pytest.mark.parametrize("end", ["txt", "txt.gz", "txt.zst"])
def test_huge_lines_are_not_held(tmp_path, end, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 100_000)
    raw = b"first\n" + b"x" * 30_000_000 + b"\nlast"
    raw = {"txt.gz": gzip.compress, "txt.zst": zstandard.compress}.get(end, bytes)(raw)
    path = tmp_path / f"a.{end}"
    path.write_bytes(raw)
    first, bad, last = read(path)
    assert (first.text, last.text, last.line) == ("first", "last", 3)
    assert (bad.reason, bad.line) == ("too long", 2)
    assert len(bad.excerpt) == documents.EXCERPT


@settings(max_examples=100)
@given(st.binary(max_size=60), st.integers(1, 9))
def test_lines_do_not_depend_on_blocks(raw, size):
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert list(text_files.lines(parts)) == list(text_files.lines([raw]))
    expected = raw.split(b"\n")
    expected = expected if expected[-1] else expected[:-1]
    found = [line for _, line in text_files.lines(parts)]
    assert found == [line.removesuffix(b"\r") for line in expected]


@pytest.mark.filterwarnings("ignore")
def test_tfds(tmp_path):
    """A real array_record data set, written and read by tfds without TensorFlow."""
    import tensorflow_datasets as tfds

    texts = some_texts("ru", 120)

    class Texts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": np.int32}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(texts):
                yield i, {"text": text, "n": i}

    made = Texts(data_dir=tmp_path, file_format="array_record")
    made.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=12)
    )
    folder = str(made.data_path)
    found, most = [], 0
    source = c.SourceConfig("en/web", (f"tfds:{folder}:train",))
    for document in inputs.read_documents(source):
        found.append(document)
        files_open = [os.path.realpath(p) for p in Path("/proc/self/fd").iterdir()]
        most = max(most, sum(p.startswith(folder) for p in files_open))
    assert most == 1  # whatever the limit of open files
    assert sorted(d.text for d in found) == sorted(texts)
    assert [d.line for d in found] == list(range(1, 121))
    assert len(read(f"tfds:{folder}:train[:25%]")) == 30
    wrong = read(f"tfds:{folder}:train", text_field="n")
    assert {b.reason for b in wrong} == {"text is not a string"}
    for split in ("none", "train[:", "train[:x]"):
        with pytest.raises(UserError, match="cannot be opened|not tfds"):
            read(f"tfds:{folder}:{split}")
    cfg = make_config((c.SourceConfig("ru/tfds", (f"tfds:{folder}:train",)),))
    result = build(cfg, tmp_path / "out", workers=2)
    assert documents_of(result, "ru/tfds") == [d.text for d in found]
    shards = sorted(Path(folder).glob("*.array_record*"))
    shards[3].write_bytes(bytes(shards[3].stat().st_size))
    writer = ArrayRecordWriter(str(shards[7]), "group_size:1")
    for _ in range(10):
        writer.write(b"not a tf.Example")
    writer.close()
    *kept, damage = read(f"tfds:{folder}:train")
    assert kept == found[:30] + found[40:70] + found[80:]
    assert (damage.line, damage.unread) == (31, 20)


# ------------------------------------------------------------------ what is refused


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
        return folder, next(folder.glob("sources/en/web/*0.arrayrecord"))

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
    edit(folder, lambda d: d.update(format=2))
    with pytest.raises(UserError, match="format 2"):
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
        "shard": ((records, "open"), lambda: corpus.open_corpus(folder)),
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
