"""The embedded tasks are whole, fair, parallel, and no training text is in them."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from functools import cache

import pytest
import yaml
import zstandard
from test_demo_corpus import leaks, train_rows

from gamayun_jax.cli import main
from gamayun_jax.demo_corpus import LANGUAGES
from gamayun_jax.demo_tasks import FOLDER
from gamayun_jax.evaluate.tasks import load_task
from recipes.demo_data import cldr_tasks, tasks
from recipes.demo_data.decontaminate import is_heldout_page
from recipes.demo_data.extract_text import Document

TASKS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in sorted(FOLDER.glob("*.yaml"))
}
CHOICE = ("next_paragraph", "cldr_facts", "cldr_lexicon")
WITH_ITEMS = (*CHOICE, "last_word", "cldr_names", "cldr_calendar", "minimal_pairs")
KINDS = {
    "perplexity": {"text"},
    "multiple_choice": {"choices", "answer"},
    "cloze": {"target"},
    "generation": {"answers"},
}
METRICS = {
    "perplexity": {"bits_per_byte"},
    "multiple_choice": {"raw", "token", "norm", "pmi"},
    "cloze": {"exact"},
    "generation": {"exact", "f1", "chrf"},
}


@cache
def read(path):
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def items(task, language):
    """Items of a task; of one {language}'s file where there are several."""
    name = TASKS[task]["data"].format(language=language)
    return [row for row in read(FOLDER / name) if row["language"] == language]


# --- shape


def test_there_are_tasks_of_every_kind():
    assert {t["kind"] for t in TASKS.values()} == set(KINDS)
    assert set(TASKS) == {*WITH_ITEMS, "help", "udhr"}


@pytest.mark.parametrize("task", TASKS)
def test_a_description_fits_its_items(task):
    told = TASKS[task]
    assert told["name"] == task
    assert told["metric"] in METRICS[told["kind"]]
    assert told["licence"]
    assert told["source"]
    templates = [told[k] for k in ("prompt", "unconditional") if k in told]
    asked = {f for t in templates for _, f, _, _ in string.Formatter().parse(t) if f}
    assert all(f.isidentifier() for f in asked)
    for k in LANGUAGES:
        rows = items(task, k)
        assert rows, k
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert row.keys() >= {"id", "language"} | KINDS[told["kind"]] | asked
            texts = [v for v in row.values() if isinstance(v, str)]
            texts += row.get("choices", []) + row.get("answers", [])
            assert all(
                t and t.isprintable() for text in texts for t in text.split("\n")
            )
            assert not any(re.search("</?[a-z]+>|&[a-z]+;", text) for text in texts)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_takes_every_item(task):
    found = load_task(task)
    assert not found.set_aside
    assert set(found.languages) == set(LANGUAGES)
    for k in LANGUAGES:
        scored = [row["id"] for row in items(task, k) if "split" not in row]
        assert [row["id"] for row in found.items[k]] == scored
        assert len(found.examples.get(k, ())) >= found.shots


@pytest.mark.parametrize("task", [t for t in TASKS if TASKS[t]["parallel"]])
def test_items_are_the_same_in_every_language(task):
    def shape(k):
        keys = ("id", "answer", "split", "kind")
        return [{key: row.get(key) for key in keys} for row in items(task, k)]

    for k in LANGUAGES:
        assert shape(k) == shape("en"), k


@pytest.mark.parametrize("task", CHOICE)
def test_nothing_but_the_content_tells_the_answer(task):
    """Four different choices; position, length and letters' overlap do not tell."""
    for k in LANGUAGES:
        rows = items(task, k)
        assert all(len({c.casefold() for c in r["choices"]}) == 4 for r in rows)
        places = Counter(r["answer"] for r in rows)
        assert max(places.values()) - min(places.values()) <= 4
        for pick in (max, min):
            by_length = [
                pick(range(4), key=lambda i: len(r["choices"][i])) for r in rows
            ]
            right = sum(a == r["answer"] for a, r in zip(by_length, rows, strict=True))
            assert right / len(rows) < 0.34, (k, pick)


def test_facts_are_not_spelled_in_the_question():
    for k in LANGUAGES:
        for row in items("cldr_facts", k):
            answer = row["choices"][row["answer"]].casefold()
            head = row["given"].casefold()[:5]
            assert head not in answer, row


def test_known_facts():
    """What no version of the data should change."""

    def answers(task, k):
        return {r["id"]: r["choices"][r["answer"]] for r in items(task, k)}

    facts = answers("cldr_facts", "ru")
    assert facts["city/Europe/Paris"] == "Франция"
    assert facts["city/Africa/Cairo"] == "Египет"
    for key, name in facts.items():
        assert (key.split("/")[0] == "continent") == (
            name in {"Африка", "Америка", "Азия", "Европа", "Океания"}
        )
    assert answers("cldr_lexicon", "de")["U+1F6E1"] == "Schutzschild"
    names = {r["id"]: r["answers"] for r in items("cldr_names", "tr")}
    assert "Fransa" in names["country/FR"]
    months = [r["answers"][0] for r in items("cldr_calendar", "pl")]
    assert months[:3] == ["styczeń", "luty", "marzec"]


def test_words_to_fill_in_are_in_the_context():
    for k in LANGUAGES:
        rows = items("last_word", k)
        assert len(rows) > 100
        for row in rows:
            word = row["target"].strip().casefold()
            assert word in row["context"].casefold()
            assert (
                row["target"][0] == " "
                or k in ("zh", "ja")
                or row["context"][-1] != " "
            )
            assert row["context"] == row["context"].rstrip()


# --- held out


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_no_item_is_in_training(language):
    trained = {p for r in train_rows(language) for p in r["text"].split("\n")}
    rows = items("next_paragraph", language)
    texts = {c for r in rows for c in r["choices"]}
    texts |= {p for r in rows for p in r["context"].split("\n")}
    assert not leaks(language, sorted(texts), trained)
    cut = items("last_word", language)
    whole = "\n".join(trained)
    for row in cut:
        assert row["context"].split("\n")[-1] + row["target"] not in whole
    for row in [*rows, *cut]:
        assert is_heldout_page(row["id"].split("#")[0])


# --- files


def test_the_manifest_tells_files_and_packages():
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    assert set(manifest["files"]) == {p.name for p in FOLDER.glob("*.zst")}
    assert sum(f["compressed_bytes"] for f in manifest["files"].values()) < 1_200_000
    for name, told in manifest["files"].items():
        path = FOLDER / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"]
        assert len(read(path)) == told["rows"]
        scored = Counter(r["language"] for r in read(path) if "split" not in r)
        assert scored == told["items"]
    for package in manifest["packages"].values():
        assert package["licence"]
        assert len(package["sha256"]) == 64


def test_licences_are_included():
    notice = (FOLDER / "NOTICE.md").read_text("utf-8")
    for task in WITH_ITEMS:
        licence = TASKS[task]["licence"]
        assert f"{licence}.txt" in notice
        assert len((FOLDER / f"{licence}.txt").read_text("utf-8")) > 1500
    assert not list(FOLDER.glob("description*"))


# --- the recipe


def page(language, path, *texts):
    paragraphs = {str(i): text for i, text in enumerate(texts)}
    return Document(language, "descriptions", "p", path, paragraphs)


def test_descriptions_of_held_out_packages_are_matched():
    held = [str(i) for i in range(3000) if is_heldout_page(str(i))][:120]
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word(n):
        return "".join(letters[(n * 7 + j * (n % 11 + 3)) % 26] for j in range(9))

    documents = []
    for i, name in enumerate(held):
        text = " ".join(word(97 * i + j) for j in range(12))
        documents.append(page("de", name, f"{word(i)} {word(i + 500)} kurz", text))
    copy = documents[0].paragraphs["1"]
    free = next(str(i) for i in range(99) if not is_heldout_page(str(i)))
    documents.append(page("de", free, "ein anderes Paket", copy))
    documents.append(page("fr", held[0], "une seule description", "x" * 80))
    rows = tasks.description_match(documents, limit=50)
    assert len(rows) == 50
    assert {r["language"] for r in rows} == {"de"}  # French has too few
    assert held[0] not in {r["id"] for r in rows}  # the full corpus trains on its copy
    text = {d.path: d.paragraphs for d in documents if d.language == "de"}
    for row in rows:
        assert row["choices"][row["answer"]] == text[row["id"]]["1"]
        assert row["short"] == text[row["id"]]["0"]
        assert len(set(row["choices"])) == 4
    assert rows == tasks.description_match(documents, limit=50)


def test_next_paragraphs_come_from_the_page():
    units = {
        "p": [(i, f"p#{i}") for i in (0, 1, 2, 3, 4, 9)],
        "q": [(0, "q#0"), (1, "q#1")],
    }
    rows = tasks.next_paragraph(units, lambda k, name: f"{k} {name}")
    english = [r for r in rows if r["language"] == "en"]
    # The first follows nothing, the last comes after a gap, q has too few.
    assert [r["id"] for r in english] == ["p#1", "p#2", "p#3", "p#4"]
    assert english[2]["context"] == "en p#1\nen p#2"
    for row in english:
        assert row["choices"][row["answer"]] == f"en {row['id']}"
        shown = {*row["choices"], *row["context"].split("\n")}
        assert len(shown) == 4 + row["context"].count("\n") + 1
        assert all(text.startswith("en p#") for text in shown)


EATEN = "Then the girl ate the "
CELLS = "然后在工作表中删除该"


@pytest.mark.parametrize(
    ("before", "text", "language", "cut"),
    [
        ("The red apple.", f"{EATEN}apple.", "en", (EATEN, "apple")),
        ("", "Only different words are used here now.", "en", None),
        ("Pineapples.", f"{EATEN}apple.", "en", None),
        ("选择单元格。", f"{CELLS}单元格。", "zh", (CELLS, "单元格")),
    ],
)
def test_words_are_cut_where_they_repeat(before, text, language, cut):
    assert tasks.repeated_word(before, text, language) == cut


def test_names_that_tell_the_answer_are_found():
    assert cldr_tasks.tells("Denmark", "Danish Krone", "en") is False
    assert cldr_tasks.tells("Norway", "Norwegian", "en")
    assert cldr_tasks.tells("墨西哥城", "墨西哥", "zh")
    assert not cldr_tasks.tells("Paris", "France", "en")


def test_positions_are_balanced():
    for count in (4, 7, 100):
        places = cldr_tasks.place_answers(count, cldr_tasks.draw("x"))
        assert max(Counter(places).values()) == -(-count // 4)


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["tasks", "build", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "was not found" in error
    assert error.count("\n") == 1
