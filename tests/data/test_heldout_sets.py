"""Held-out files: what is refused, and which sets are parallel."""

from __future__ import annotations

import random
import shutil

import pytest
from small_corpora import build, documents_of, make_config, some_texts, write_jsonl

from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data import (
    heldout_sets,
    inspect_corpus,
)


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


def others(rows):
    """The ids of other texts."""
    return [{**r, "text": s["text"]} for r, s in zip(rows, rows[::-1], strict=True)]


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
        # The same ids by chance, such as numbers of lines: only lengths tell.
        (others, None, False, "since ids are the same, but lengths are not those of"),
        (others, True, True, "WARNING: units of ru and of the first language"),
        (others, False, False, ""),
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
