"""The embedded corpus is whole, clean, and holds nothing of its held-out sets."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from functools import cache

import pytest
import zstandard

from gamayun_jax.config import UserError
from gamayun_jax.demo_corpus import FOLDER, LANGUAGES, heldout_files, train_files
from recipes.demo_data import debian, decontaminate, extract_text

SCRIPT = dict(ru="[а-яё]", zh="[一-鿿]", ja="[ぁ-ヿ一-鿿]", ko="[가-힣]")
TYPICAL = dict(en="the", de="der", fr="les", es="los", it="della", pt="não", pl="się")
TYPICAL |= dict(tr="için", ru="для")
DENSE = ("zh", "ja", "ko")


@cache
def rows(path):
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_rows(language):
    files = train_files()
    return [r for k, p in files.items() if k[:2] == language for r in rows(p)]


def held_texts(language):
    return [
        r["text"] for n in ("help", "udhr") for r in rows(heldout_files(n)[language])
    ]


# --- leak: written without the builder's functions, so that one checks the other


def letters(text, language):
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\d+", "0", text)
    if language in DENSE:  # a Latin name is one sign among ideographs
        text = re.sub(r"[a-z]+", "a", text)
    return "".join(c for c in text if c.isalnum())


def pieces(text, size):
    return {text[i : i + size] for i in range(len(text) - size + 1)}


def leaks(language, held, paragraphs):
    """Paragraphs that equal a held-out text, or share half of its pieces with one."""
    size = 6 if language in DENSE else 13
    normal = [letters(text, language) for text in held]
    sets = [pieces(text, size) for text in normal]
    owners: dict[str, list[int]] = {}
    for number, found in enumerate(sets):
        for piece in found:
            owners.setdefault(piece, []).append(number)
    whole = set(normal)
    found = []
    for paragraph in paragraphs:
        text = letters(paragraph, language)
        mine = pieces(text, size)
        shared = Counter(o for p in mine & owners.keys() for o in owners[p])
        near = any(2 * n >= len(sets[o]) for o, n in shared.items())
        within = len(mine) >= size and 2 * max(shared.values(), default=0) >= len(mine)
        if text in whole or near or within:
            found.append(paragraph)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_no_held_out_text_in_training(language):
    paragraphs = {p for r in train_rows(language) for p in r["text"].split("\n")}
    held = held_texts(language)
    assert not paragraphs & set(held)
    assert not leaks(language, held, paragraphs)
    everywhere = {t for other in LANGUAGES for t in held_texts(other)}
    assert not paragraphs & everywhere


def test_the_leak_test_itself_catches_copies():
    held = ["Click Insert 3 times, then choose the second entry of the list."]
    copy = "CLICK insert 12 times; then choose the second entry of the LIST!"
    more = "Remember: click Insert 3 times, then choose the second entry in a menu."
    other = "The second page of the wizard asks for the name of a database."
    assert leaks("en", held, [copy, more, other]) == [copy, more]


def test_no_held_out_page_in_training():
    paths = {r["id"].split("#")[0] for r in rows(heldout_files()["en"])}
    assert len(paths) > 50
    for source, path in train_files().items():
        if source.endswith("/help"):
            assert not paths & {r["path"] for r in rows(path)}, source


# --- shape


def test_every_language_is_there():
    assert set(train_files()) == {f"{k}/help" for k in LANGUAGES} | {"en/hq"}
    for name in ("help", "udhr"):
        assert list(heldout_files(name)) == list(LANGUAGES)
    with pytest.raises(UserError, match="udhr"):
        heldout_files("wikipedia")


def test_documents_name_their_language_and_origin():
    for source, path in train_files().items():
        for row in rows(path):
            assert f"{row['language']}/{row['domain']}" == source
            assert row["id"] == f"{source}/{row['package']}/{row['path']}"
        ids = [r["id"] for r in rows(path)]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("name", "least"), [("help", 300), ("udhr", 50)])
def test_held_out_ids_are_parallel(name, least):
    files = heldout_files(name)
    ids = [r["id"] for r in rows(files["en"])]
    assert len(set(ids)) == len(ids) >= least
    for language, path in files.items():
        assert [r["id"] for r in rows(path)] == ids
        assert {r["language"] for r in rows(path)} == {language}
        assert all(r["text"] for r in rows(path))
    if name == "help":
        assert min(len(r["text"]) for r in rows(files["en"])) >= 25


def test_clauses_of_the_declaration_do_not_repeat():
    for path in heldout_files("udhr").values():
        texts = [r["text"] for r in rows(path)]
        assert len(set(texts)) == len(texts)


def test_checksums_and_counts_in_the_manifest():
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    there = {p.relative_to(FOLDER).as_posix() for p in FOLDER.glob("*/*.zst")}
    assert set(manifest["files"]) == there
    for name, told in manifest["files"].items():
        data = (FOLDER / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == told["sha256"], name
        assert len(rows(FOLDER / name)) == told["rows"]
    for package in manifest["packages"].values():
        assert package["licence"]
        assert len(package["sha256"]) == 64
    assert manifest["missing"] == []


def test_small_enough_to_be_committed():
    sizes = [p.stat().st_size for p in FOLDER.glob("*/*.zst")]
    assert sum(sizes) < 4_200_000
    assert max(sizes) < 1_000_000


def test_licence_texts_are_included():
    notice = (FOLDER / "NOTICE.md").read_text("utf-8")
    for name in ("MPL-2.0.txt", "PSF-2.0.txt", "MIT-udhr.txt"):
        assert name in notice
        assert len((FOLDER / name).read_text("utf-8")) > 900


def test_languages_are_as_unbalanced_as_real_text():
    size = {
        k: sum(len(r["text"].encode()) for r in rows(p))
        for k, p in train_files().items()
    }
    assert max(size, key=size.get) == "en/help"
    assert min(size, key=size.get) == "tr/help"
    assert size["en/help"] > 4 * size["tr/help"]
    assert min(size.values()) > 300_000


# --- text


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_clean(language):
    texts = [r["text"] for r in train_rows(language)] + held_texts(language)
    for text in texts:
        assert unicodedata.is_normalized("NFC", text)
        assert not re.search("[\u00ad\u200b\ufeff\r\t]|  |\n\n", text)
        assert text == text.strip()
    # Of the page around the text: debug footer, search field, scripts, tags of html.
    furniture = "DisplayArea|Help content debug|Search in chosen|</(p|div|span)>"
    found = [t for t in texts if re.search(furniture, t)]
    assert not [t for t in found if "html" not in t.lower()], found[:3]


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_in_its_language(language):
    texts = [r["text"] for r in train_rows(language)]
    whole = "\n".join(texts).lower()
    if language in SCRIPT:
        alphabetic = sum(c.isalpha() for c in whole)
        share = len(re.findall(SCRIPT[language], whole)) / alphabetic
        assert share > 0.8
    if word := TYPICAL.get(language):
        count = len(re.findall(rf"\b{word}\b", whole))
        assert count > len(whole.split()) / 300
    if language != "en":
        english = re.findall(r"\b(the|of|with|which|this|your)\b", whole)
        assert len(english) < len(whole) / 1000


# --- the recipe

PAGE = """<html><body><p id="outside">Help</p><div id="DisplayArea">
<h1 id="hd_1">Adding\u00ad Captions</h1>
<p id="par_1">Choose <span class="switchinline"><span hidden="true" id="MAC1"
 class="MAC"><b>LibreOffice - Preferences</b></span><span hidden="true"
 id="default1"><b>Tools - Options</b></span></span>.<br>Then wait.</p>
<p id="par_2"><span class="switch"><span hidden="true" class="WRITER">A text
</span><span hidden="true" class="CALC">A sheet</span></span> opens.</p>
<p class="paragraph">without an id</p><p id="par_1">the same id again</p>
<table><tr><td><p id="par_3">SUM</p></td></tr></table>
<div class="relatedtopics"><p id="par_4">Related links</p></div>
</div><footer><p id="bug">debug info</p></footer></body></html>"""


def test_paragraphs_of_a_help_page():
    assert extract_text.help_paragraphs(PAGE.encode()) == {
        "hd_1": "Adding Captions",
        "par_1": "Choose Tools - Options. Then wait.",
        "par_2": "A text opens.",
    }
    assert (
        extract_text.help_paragraphs(b"<html><body><p id='a'>no area</p></body></html>")
        == {}
    )


def test_paragraphs_of_a_documentation_page():
    page = b"""<body><div class="related">Index</div><div role="main"><h1>Sorting<a
    class="headerlink">P</a></h1><p>Use <code>sorted()</code>:</p><pre>x = 1</pre>
    <ul><li><p>one item</p></li></ul><dl><dt class="sig">f(x)</dt><dd><p>Does f.</p>
    </dd></dl></div><div class="footer">2023</div></body>"""
    found = list(extract_text.html_paragraphs(page).values())
    assert found == ["Sorting", "Use sorted():", "one item", "Does f."]


def test_paragraphs_of_a_manual_page():
    page = (
        b'.\\" comment\n.TH LS 1\n.SH NAME\nls \\- list\n.B \\-a\nall\n.nf\ncode\n.fi\n'
    )
    assert list(extract_text.man_paragraphs(page).values()) == [
        "NAME",
        "ls - list -a all",
    ]


def test_wrapped_lines_join_as_the_language_writes():
    assert extract_text.unwrap(["ein", "Paket"], "de") == "ein Paket"
    assert extract_text.unwrap(["漢字", "の web", "page"], "ja") == "漢字の web page"


def test_near_duplicates_are_found():
    unit = "Click Insert 3 times, then choose the second entry of the list."
    dense = "请先选择第3个单元格区域，然后单击确定按钮。"
    verdicts = decontaminate.NearDuplicateFinder([unit, "Table"]).judge(
        [
            unit,
            "CLICK  insert 12 times; then choose the second entry of the LIST",
            f"{unit} Then close the window, and repeat this for all other documents.",
            "The second page of the wizard asks for the name of a database.",
            "table",
            "",
        ]
    )
    assert verdicts == ["exact", "near", "near", "", "near", ""]
    changed = ["请先选择第25个单元格区域,然后单击确定按钮", "打开一个新的文本文档。"]
    assert decontaminate.NearDuplicateFinder([dense], dense=True).judge(changed) == [
        "near",
        "",
    ]
    # A short heading may quote a long text; half of a long paragraph may not.
    assert decontaminate.NearDuplicateFinder([unit]).judge(["The Second Entry"]) == [""]


def test_translations_of_held_out_text_go_with_it():
    page = next(p for p in map(str, range(99)) if not decontaminate.is_heldout_page(p))
    english = extract_text.Document(
        "en", "help", "p", page, {"1": "Same text", "2": "Kept"}
    )
    german = extract_text.Document(
        "de", "help", "q", page, {"1": "Eigen", "2": "Bleibt"}
    )
    report = extract_text.Report()
    held = {"en": ["Same text"], "de": ["Etwas anderes"]}
    kept = list(decontaminate.keep_out([german, english], held, report))
    assert [d.paragraphs for d in kept] == [{"2": "Kept"}, {"2": "Bleibt"}]
    assert report.rejected["de/help"] == {"held out: in English": 1}


def test_a_smaller_sample_is_a_prefix_of_a_larger_one():
    documents = [
        extract_text.Document("de", "help", "p", str(k), {"1": f"Absatz {k} " * 20})
        for k in range(30)
    ]
    large = debian.select_documents(documents, 4000, Counter())
    small = debian.select_documents(documents[::-1], 2000, Counter())
    assert small == large[: len(small)]
    assert 4 < len(small) < len(large) < 30


@pytest.mark.parametrize(
    ("text", "language", "why"),
    [
        ("Wählen Sie die Datei aus.", "de", ""),
        ("Choose the name of the file and the folder.", "de", "not translated"),
        ("Original words", "pl", "not translated"),
        ("Print the document", "ru", "not in the language's script"),
        ("12 + 4.5", "en", "numbers and signs"),
    ],
)
def test_paragraphs_that_are_not_the_language_are_rejected(text, language, why):
    assert decontaminate.rejection(text, language, {"Original words"}) == why


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no-such-program was not found.*Debian"):
        debian.command("no-such-program", cwd=tmp_path)
    with pytest.raises(UserError, match=r"`ls --frob` failed in .*check the network"):
        debian.command("ls", "--frob", cwd=tmp_path)
    with pytest.raises(UserError, match="languages en xx: choose among en ru"):
        debian.build_full(tmp_path, tmp_path, ["en", "xx"])
