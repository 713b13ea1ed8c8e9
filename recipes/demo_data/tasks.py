"""Test items with a right answer, in 12 languages, from public packages.

    gamayun tasks build --out DIR               # all of them, and package descriptions
    gamayun tasks build --out gamayun_jax/demo_tasks --embedded      # what is committed

Archives are fetched and read as debian.py does it. Same packages, same bytes out: what
is drawn depends on fixed seeds and ids alone. An item says the same in every language
(same id, same choices in the same order) where the task's YAML says `parallel: true`.
Each position among the choices is right equally often.

  next_paragraph     which of four paragraphs of a help page follows?
  last_word          a word of a help paragraph that was used before
  cldr_facts         city -> country; country -> continent, currency, language
  cldr_lexicon       English name of a thing -> its name in the language
  cldr_names         English name of a country -> written in the language
  cldr_calendar      three months or weekdays -> the next one
  minimal_pairs      which of two phrases is right? (minimal_pairs.py)
  description_match  a package's short description -> its long one (not committed: the
                     descriptions are licensed as the packages are, GPL at worst)

Help text is from held-out pages, and neither it nor anything near it is in the training
files that are embedded; the full recipe keeps it out as well (heldout.py).
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from gamayun_jax.data.files import file_sha256, write_json, write_text
from gamayun_jax.demo_corpus import LANGUAGES
from gamayun_jax.demo_tasks import FOLDER
from recipes.demo_data import cldr_tasks, debian
from recipes.demo_data.cldr_tasks import CHOICES, Item, draw, with_choices, write_items
from recipes.demo_data.decontaminate import (
    DENSE,
    NearDuplicateFinder,
    heldout_units,
    is_heldout_page,
    keep_language,
    trained_paragraphs,
)
from recipes.demo_data.extract_text import Document, Report
from recipes.demo_data.minimal_pairs import minimal_pairs

Pages = Mapping[str, Sequence[tuple[int, str]]]

# --- help pages


def unseen_units(documents: Sequence[Document]) -> dict[str, list[tuple[int, str]]]:
    """Held-out page -> (place on the English page, id) of units that are unlike all
    embedded training text in every language, in the order of the page."""
    units = heldout_units(documents, LANGUAGES, None)
    seen: set[str] = set()
    for k in LANGUAGES:
        dense, paragraphs = k in DENSE, trained_paragraphs(k)
        verdicts = NearDuplicateFinder(units[k].values(), dense).judge(paragraphs)
        close = [p for p, v in zip(paragraphs, verdicts, strict=True) if v]
        for name, text in units[k].items():
            if name not in seen and any(
                NearDuplicateFinder([text], dense).judge(close)
            ):
                seen.add(name)
    found: dict[str, list[tuple[int, str]]] = {}
    for doc in documents:
        if doc.language == "en" and doc.domain == "help":
            names = [f"{doc.path}#{key}" for key in doc.paragraphs]
            good = [
                (i, n) for i, n in enumerate(names) if n in units["en"].keys() - seen
            ]
            if good:
                found[doc.path] = good
    return dict(sorted(found.items()))


def next_paragraph(
    pages: Pages,
    text_of: Callable[[str, str], str],
) -> list[Item]:
    """The paragraph after one or two others; wrong ones are from the same page.

    Choices are short enough for a window of 256 tokens and a small vocabulary.
    """
    rng = draw("next_paragraph")
    drafts = []

    def short(name: str) -> bool:
        most = {k: 150 if k in DENSE else 360 for k in LANGUAGES}
        return all(len(text_of(k, name)) <= most[k] for k in LANGUAGES)

    for units in pages.values():
        for i in range(1, len(units)):
            if units[i][0] - units[i - 1][0] > 3:
                continue  # too much of the page lies between them
            near = i > 1 and units[i - 1][0] - units[i - 2][0] <= 3
            context = [name for _, name in units[i - 2 if near else i - 1 : i]]
            right = units[i][1]
            taken = (*context, right)
            wrong = [name for _, name in units if name not in taken and short(name)]
            if short(right) and len(wrong) >= CHOICES - 1:
                drafts.append((context, right, rng.sample(wrong, CHOICES - 1)))
    return [
        {
            "id": choices[answer],
            "language": k,
            "context": "\n".join(text_of(k, name) for name in context),
            "choices": [text_of(k, name) for name in choices],
            "answer": answer,
        }
        for drawn in [with_choices(drafts, rng)]
        for k in LANGUAGES
        for context, choices, answer in drawn
    ]


WORD = re.compile(r"[^\W\d_]{4,}")
LONGEST = 10_000
IDEOGRAPHS = re.compile("[一-鿿]{2,}|[ァ-ヺー]{3,}")


def repeated_word(before: str, text: str, language: str) -> tuple[str, str] | None:
    """(`text` up to its last word that was used before, that word); None without one.

    In Chinese and Japanese, which have no spaces, a "word" is the longest run of two
    to six ideographs (or three and more katakana) that ends a longer run or is it.
    A text beyond LONGEST characters is no item: every word is looked for in all of it.
    """
    if len(before) + len(text) > LONGEST:
        return None
    if language in ("zh", "ja"):
        for run in reversed(list(IDEOGRAPHS.finditer(text))):
            for begin in range(max(8, run.start(), run.end() - 6), run.end() - 1):
                word = text[begin : run.end()]
                if word in before + "\n" + text[:begin]:
                    return text[:begin], word
        return None
    for found in reversed(list(WORD.finditer(text))):
        head = (before + "\n" + text[: found.start()]).casefold()
        whole = rf"(?<!\w){re.escape(found[0].casefold())}(?!\w)"
        apart = text[found.start() - 1 : found.start()] == " "
        if found.start() >= 20 and apart and re.search(whole, head):
            return text[: found.start()], found[0]
    return None


def last_word(
    pages: Pages,
    text_of: Callable[[str, str], str],
    limit: int = 200,
) -> list[Item]:
    """Paragraphs cut before a word that the context has; as LAMBADA (1606.06031).

    A paragraph may be new and its beginning not: what training has is left out.
    """
    items: list[Item] = []
    for k in LANGUAGES:
        found = []
        trained = "\n".join(trained_paragraphs(k))
        for units in pages.values():
            for i, (place, name) in enumerate(units):
                joined = i and place - units[i - 1][0] <= 3
                before = text_of(k, units[i - 1][1]) if joined else ""
                cut = repeated_word(before, text_of(k, name), k)
                if cut and "".join(cut) not in trained:
                    head, target = cut
                    # A space belongs to the word after it, as in most tokenizers.
                    gap = "" if head == head.rstrip() else " "
                    context = f"{before}\n{head.rstrip()}".strip()
                    row = {"id": name, "language": k, "context": context}
                    found.append({**row, "target": gap + target})
        chosen = draw(f"last_word {k}").sample(found, min(limit, len(found)))
        items += sorted(chosen, key=lambda item: item["id"])
    return items


# --- package descriptions


def pieces(text: str, size: int = 3) -> set[str]:
    """Runs of `size` characters, without case."""
    text = text.casefold()
    return {text[i : i + size] for i in range(len(text) - size + 1)}


def description_match(documents: Sequence[Document], limit: int = 300) -> list[Item]:
    """The long description that belongs to a short one, of held-out packages.

    Kept are those unlike the descriptions that the full corpus trains on. Languages
    have different packages; one with fewer than 40 items is left out. The wrong ones
    are as long, and look most like the short description: else its words would tell.
    """
    texts: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    trained: dict[str, list[str]] = defaultdict(list)
    for doc in documents:
        short, long = (doc.paragraphs.get(key, "") for key in ("0", "1"))
        if not is_heldout_page(doc.path):
            trained[doc.language] += doc.paragraphs.values()
        elif 20 <= len(short) <= 120 and 60 <= len(long) <= 500:
            texts[doc.language][doc.path] = (short, long)
    items: list[Item] = []
    for k in LANGUAGES:
        rng, found = draw(f"description_match {k}"), texts[k]
        names = sorted(found)
        finder = NearDuplicateFinder(trained[k], k in DENSE)
        verdicts = finder.judge([found[n][1] for n in names])
        names = [n for n, v in zip(names, verdicts, strict=True) if not v]
        # One of each family of packages: they share their descriptions' beginnings.
        for part in (1, 0):
            heads = {found[n][part][:40].casefold(): n for n in reversed(names)}
            names = sorted(heads.values())
        grams = {n: (pieces(found[n][0]), pieces(found[n][1])) for n in names}
        # Not those that say the same words again.
        names = [
            n for n in names if 2 * len(grams[n][0] & grams[n][1]) <= len(grams[n][0])
        ]
        if len(names) < 40:
            continue
        drafts = []
        for name in sorted(rng.sample(names, min(limit, len(names)))):
            size = len(found[name][1])
            others = sorted(names, key=lambda n: (abs(len(found[n][1]) - size), n))
            others = [n for n in others if n != name][:24]
            alike = {n: len(grams[name][0] & grams[n][1]) for n in others}
            close = sorted(alike, key=lambda n: (-alike[n], n))[:6]
            drafts.append((name, name, rng.sample(close, CHOICES - 1)))
        items += (
            {
                "id": name,
                "language": k,
                "short": found[name][0],
                "choices": [found[c][1] for c in choices],
                "answer": answer,
            }
            for name, choices, answer in with_choices(drafts, rng)
        )
    return items


# --- output

DESCRIPTION_MATCH = """\
name: description_match
kind: multiple_choice
description: the long description that belongs to a package's short one
data: description_match.jsonl.zst
prompt: "{short}\\n"
choice: "{choice}"
parallel: false
metric: norm
unconditional: ""
shots: 0
seed: 0
baseline: overlap
licence: of each package, GPL at worst
source: descriptions of Debian packages and their translations
"""


def build(out: Path, work: Path, embedded: bool = False) -> dict[str, dict[str, Any]]:
    """Write all tasks (`embedded`: those that may be committed) and a manifest.

    Args:
      out: folder for YAML and items; what it holds under the same names is replaced.
      work: for downloads; used again by the next build.

    Returns:
      File name -> counts and SHA-256, as in the manifest.

    Raises:
      UserError: a program is missing, a download failed, a package does not exist.
    """
    report, work = Report(), work.resolve()
    sources = [s for s in debian.sample_sources(LANGUAGES) if s.domain == "help"]
    documents = debian.read_packages(sources, work, LANGUAGES, report)
    debian.require_all(report)
    documents = keep_language(documents, report)
    texts = {
        (doc.language, f"{doc.path}#{key}"): text
        for doc in documents
        for key, text in doc.paragraphs.items()
    }
    pages = unseen_units(documents)

    def text_of(language: str, unit: str) -> str:
        return texts[language, unit]

    cldr = cldr_tasks.Cldr(work)
    tasks = {
        "next_paragraph": next_paragraph(pages, text_of),
        "last_word": last_word(pages, text_of),
        "cldr_facts": cldr_tasks.cldr_facts(cldr),
        "cldr_lexicon": cldr_tasks.cldr_lexicon(cldr),
        "cldr_names": cldr_tasks.cldr_names(cldr),
        "cldr_calendar": cldr_tasks.cldr_calendar(cldr),
        "minimal_pairs": minimal_pairs(cldr),
    }
    for key, archive in cldr.archives.items():
        name, version = cldr_tasks.CLDR[key].split("@")
        told = dict(version=version, sha256=file_sha256(archive), licence="Unicode-3.0")
        report.packages[f"{name} (npm)"] = told
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != FOLDER.resolve():
        for name in (*(f"{task}.yaml" for task in tasks), "NOTICE.md"):
            shutil.copy(FOLDER / name, out)
    if not embedded:
        described = debian.read_descriptions(work, LANGUAGES, report)
        tasks["description_match"] = description_match(keep_language(described, report))
        write_text(out / "description_match.yaml", DESCRIPTION_MATCH)
    files = {
        f"{task}.jsonl.zst": write_items(out / f"{task}.jsonl.zst", items)
        for task, items in tasks.items()
    }
    manifest = {"files": files, "packages": report.packages}
    write_json(out / "manifest.json", manifest | {"zstandard": zstandard.__version__})
    return files
