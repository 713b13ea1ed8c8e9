"""Held-out texts are found inside of training documents, and what is not is left."""

from __future__ import annotations

import json
import random
import time
import tracemalloc

import pytest
from small_corpora import (
    ALPHABETS,
    build,
    documents_of,
    make_config,
    some_texts,
    write_jsonl,
)

from gamayun_jax import config as c
from gamayun_jax.data import (
    contamination,
    inspect_corpus,
)
from gamayun_jax.data.contamination import Contamination


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
