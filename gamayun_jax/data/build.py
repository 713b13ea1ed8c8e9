"""Building a corpus: from a recipe and its documents to a finished folder.

Three steps, each in parallel and each restartable (see corpus_jobs): scan the input
files, find the duplicates, tokenise into shards; the manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures.thread import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gamayun_jax.config import Config, CorpusConfig, SourceConfig, UserError
from gamayun_jax.data.build_jobs import (
    Heldout,
    Part,
    Pool,
    contamination,
    fit_tokenizer,
    plan_shards,
    scan,
    select,
    tokenise,
)
from gamayun_jax.data.contamination import Contamination
from gamayun_jax.data.corpus import (
    FORMAT,
    Corpus,
    open_corpus,
    subsample_units,
    text_key,
    token_dtype,
    told_damage,
    xz_bytes,
)
from gamayun_jax.data.documents import (
    CLEANING,
    HARMLESS,
    NAME,
    BadDocument,
    Input,
    clean,
    expand,
    read_documents,
)
from gamayun_jax.data.files import atomic, file_sha256, lock, read_json, write_json
from gamayun_jax.data.tokenizer import Tokenizer


def check_recipe(cfg: Config) -> None:
    """Raise UserError for what a corpus config's field types cannot say."""
    corpus = cfg.corpus
    names = [s.name for s in corpus.sources]
    if not names:
        raise UserError("corpus.sources is empty: a corpus needs at least one source")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"corpus.sources has {twice!r} twice: give all files in one")
    for name in names:
        parts = name.split("/")
        if len(parts) != 2 or not all(NAME.fullmatch(p) for p in parts):
            raise UserError(
                f"corpus.sources: {name!r} is not <language>/<domain> in letters, "
                "digits, - and _"
            )
    heldout = {h.name: h for h in corpus.heldout}
    if len(heldout) < len(corpus.heldout):
        raise UserError(
            "corpus.heldout: two sets have the same name; give each its own"
        )
    for name in heldout:
        if not NAME.fullmatch(name):
            raise UserError(f"corpus.heldout: {name!r} is not letters, digits, - and _")
    used = {n.split("/")[0] for n in names}
    for language in sorted(used | {k for h in corpus.heldout for k in h.files}):
        if language not in cfg.languages:
            raise UserError(
                f"corpus has language {language!r}, which is not in languages "
                f"({', '.join(cfg.languages)}): add it there"
            )
    if corpus.record_tokens % cfg.data.seq_len:
        raise UserError(
            f"corpus.record_tokens={corpus.record_tokens} is not a multiple of "
            f"data.seq_len={cfg.data.seq_len}: make it one"
        )


def read_heldout(cfg: CorpusConfig) -> tuple[Heldout, dict[str, bool]]:
    """Set -> language -> (id, cleaned text) in the order given; set -> is it parallel?

    Raises:
      UserError: any unit that cannot be read, an id that comes twice, or parallel files
        that do not match.
    """
    sets: Heldout = {}
    parallel: dict[str, bool] = {}
    for spec in cfg.heldout:
        found: dict[str, list[tuple[str, str]]] = {}
        named = True  # has every unit an id of its own?
        for language, file in spec.files.items():
            at = f"corpus.heldout[{spec.name!r}].files[{language!r}]"
            units = found.setdefault(language, [])
            places: dict[str, int] = {}
            source = SourceConfig(at, (file,))
            if [item.files for item in expand(source)] != [(file,)]:
                raise UserError(
                    f"{at}: {file!r} is no single file: give one, with all units"
                )
            for unit in read_documents(source):
                if isinstance(unit, BadDocument):
                    why = f" ({unit.detail})" if unit.detail else ""
                    raise UserError(f"{at}: {file}:{unit.line}: {unit.reason}{why}")
                text = clean(unit.text)
                if not text:
                    raise UserError(
                        f"{at}: {file}:{unit.line} has no text: take the unit out"
                    )
                named = named and unit.id is not None
                id = str(len(units)) if unit.id is None else unit.id
                id = id.encode("utf-8", "backslashreplace").decode()
                if id in places:
                    what = "id" if unit.id is not None else "no id, so its number"
                    raise UserError(
                        f"{at}: {file}:{unit.line} has {what} {id!r}, as line "
                        f"{places[id]} has: give each unit an id of its own"
                    )
                places[id] = unit.line
                units.append((id, text))
            if not units:
                raise UserError(f"{at}: {file} is empty: take it out of corpus.heldout")
        if not found:
            raise UserError(f"held-out set {spec.name!r} has no files: give some")
        sets[spec.name] = found
        why = unlike_ids(found)
        parallel[spec.name] = spec.parallel or (
            spec.parallel is None and named and not why
        )
        if spec.parallel and why:
            raise UserError(
                f"held-out set {spec.name!r} is parallel, but {why}: give the same "
                "units in the same order, or leave parallel out"
            )
    return sets, parallel


def unlike_ids(found: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Where the ids of a set's languages first differ; "" if they do not."""
    (first, units), *others = found.items()
    ids = [i for i, _ in units]
    for language, those in others:
        their_ids = [i for i, _ in those]
        if len(ids) != len(their_ids):
            return f"{language} has {len(their_ids)} units and {first} {len(ids)}"
        for k, (mine, theirs) in enumerate(zip(ids, their_ids, strict=True), start=1):
            if mine != theirs:
                return (
                    f"{language} has id {theirs!r} at unit {k}, where {first} has "
                    f"{mine!r}"
                )
    return ""


def unlike_lengths(found: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, float]:
    """Language -> correlation of its units' log lengths with the first language's,
    where it is too low for translations (which have 0.8 and more)."""
    logs = {k: np.log([len(t) for _, t in units]) for k, units in found.items()}
    first, *others = logs
    low = {}
    for k in others:
        # Few units, or all of one length, tell nothing.
        if len(logs[k]) >= 20 and min(logs[first].std(), logs[k].std()) > 0.1:
            r = float(np.corrcoef(logs[first], logs[k])[0, 1])
            if r < 0.5:
                low[k] = round(r, 3)
    return low


def write_heldout(sets: Heldout, folder: Path) -> None:
    """<set>.<language>.jsonl of every set, as the corpus has them."""
    for name, found in sets.items():
        for language, units in found.items():
            with atomic(folder / f"{name}.{language}.jsonl") as temporary:
                lines_of = [
                    json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n"
                    for i, t in units
                ]
                temporary.write_text("".join(lines_of), "utf-8")


def check_model(cfg: CorpusConfig) -> None:
    """Raise UserError if a ready tokenizer is not one that the config describes."""
    if not cfg.tokenizer.model:
        return
    size = Tokenizer(cfg.tokenizer.model).vocab_size
    if size != cfg.tokenizer.vocab_size:
        raise UserError(
            f"tokenizer {cfg.tokenizer.model} has {size} pieces, but "
            f"corpus.tokenizer.vocab_size={cfg.tokenizer.vocab_size}: set it to that"
        )


def describe_inputs(files: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """What the recipe and the manifest say of each (name, path)."""

    def describe(file: tuple[str, str]) -> dict[str, Any]:
        name, path = file
        try:
            size, sha = os.path.getsize(path), file_sha256(path)
        except OSError as e:
            raise UserError(f"input {path} cannot be read: {e.strerror or e}") from e
        return {"file": name, "sha256": sha, "bytes": size}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(describe, files))


def recipe_of(
    cfg: Config, inputs: Sequence[Input], parallel: Mapping[str, bool]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that decides the bytes of the corpus, and the description of its inputs.

    Names of folders are not part of it: a copied corpus is the same corpus. Neither
    are `max_bad_share` and `on_damaged_file`: they decide if there is a corpus, not
    which.
    """
    files: list[tuple[str, str]] = []
    for item in inputs:
        for path in item.files:
            single = item.kind != "tfds"
            files.append(
                (item.name if single else f"{item.name}/{Path(path).name}", path)
            )
    ends = [len(files)]
    for spec in cfg.corpus.heldout:
        files += [(Path(path).name, path) for path in spec.files.values()]
    ends.append(len(files))
    model = cfg.corpus.tokenizer.model
    if model:
        files.append((Path(model).name, model))
    described = describe_inputs(files)
    corpus = cfg.corpus
    recipe = {
        "format": FORMAT,
        "cleaning": CLEANING,
        "languages": list(cfg.languages),
        "sources": [
            [i.source, i.text_field, i.kind, i.split, i.name, len(i.files)]
            for i in inputs
        ],
        "heldout": [[h.name, parallel[h.name], list(h.files)] for h in corpus.heldout],
        "held_out_copies": corpus.held_out_copies,
        "tokenizer": [
            corpus.tokenizer.vocab_size,
            None if model else sorted(corpus.tokenizer.shares.items()),
            None if model else corpus.tokenizer.sample_bytes,
        ],
        "record_tokens": corpus.record_tokens,
        "shard_bytes": corpus.shard_bytes,
        "min_chars": corpus.min_chars,
        "inputs": described,
    }
    return recipe, described


def build(
    cfg: Config, out: Path, workers: int | None = None, progress: bool = True
) -> Corpus:
    """Build the corpus of `cfg.corpus` in the folder `out`, or go on with it.

    Kill it at any time and run it again: finished work is kept and the result is the
    same. `workers` is the number of processes (default: the cores of this machine).
    Progress and what was left out go to stderr.

    Raises:
      UserError: bad config or input, a folder that holds another corpus, a full disk.
    """
    out = Path(out)
    check_recipe(cfg)
    inputs = [item for source in cfg.corpus.sources for item in expand(source)]
    heldout, parallel = read_heldout(cfg.corpus)
    check_model(cfg.corpus)
    recipe, described = recipe_of(cfg, inputs, parallel)
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out):
            if not find_former(out, fingerprint):
                with Pool(workers) as pool:
                    manifest = make(cfg, out, inputs, heldout, parallel, pool, progress)
                manifest |= {"recipe": fingerprint, "inputs": described}
                write_json(out / "manifest.json", manifest)
            shutil.rmtree(out / ".work", ignore_errors=True)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(
            f"corpus {out} cannot be written: {e.strerror or e}{where}; what is "
            "finished is kept, run it again"
        ) from e
    return open_corpus(out)


def find_former(out: Path, fingerprint: str) -> bool:
    """True if the corpus is there already; else make `out` ready to build in.

    Raises:
      UserError: it holds a corpus, or a part of one, of another recipe.
    """
    mark = out / ".work" / "recipe.json"
    for path, what in (
        (out / "manifest.json", "a corpus"),
        (mark, "an unfinished one"),
    ):
        if path.exists():
            advice = "delete the folder and build the corpus again"
            former = read_json(path, advice)
            if former.get("recipe") == fingerprint:
                return path.name == "manifest.json"
            if former.get("cleaning", 1) != CLEANING:
                raise UserError(
                    f"{out} holds {what} of another recipe (a version of this program "
                    "with other rules for cleaning text): train on it as it is, or "
                    "give another --out to build by the present rules"
                )
            raise UserError(
                f"{out} holds {what} of another recipe (config or input files "
                "differ): give another --out, or delete it first"
            )
    for name in ("sources", "heldout", "rejected", "tokenizer.model"):
        if (out / name).exists():
            raise UserError(
                f"{out} has {name!r} in it, but no corpus: give another --out"
            )
    write_json(mark, {"recipe": fingerprint, "cleaning": CLEANING})
    return False


def make(
    cfg: Config,
    out: Path,
    inputs: Sequence[Input],
    heldout: Heldout,
    parallel: Mapping[str, bool],
    pool: Pool,
    progress: bool,
) -> dict[str, Any]:
    """Everything of a build but the manifest, which it returns."""
    corpus = cfg.corpus
    write_heldout(heldout, out / "heldout")
    in_heldout = {}
    for name, languages in heldout.items():
        rows: dict[str, Any] = {}
        for language, units in languages.items():
            # The texts that an evaluation scores: all, or as many as the config says.
            scored = (subsample_units(units, n) for n in (0, cfg.evaluation.max_units))
            texts = ["\n".join(t for _, t in s).encode() for s in scored]
            rows[language] = {
                "units": len(units),
                "bytes": sum(len(t.encode()) for _, t in units),
                "sha256": file_sha256(out / "heldout" / f"{name}.{language}.jsonl"),
                "short": Contamination(name, units).short,
                "xz": {text_key(t): xz_bytes(t) for t in texts},
            }
        low = unlike_lengths(languages) if parallel[name] else {}
        asked = next(h.parallel for h in corpus.heldout if h.name == name)
        why = unlike_ids(languages) or "there are units without an id"
        in_heldout[name] = {
            "parallel": parallel[name],
            "languages": rows,
            "unlike_lengths": low,
            "unlike_ids": "" if parallel[name] or asked is False else why,
            "copies": corpus.held_out_copies,
        }

    held_folder = out / "heldout" if heldout else None
    work = out / ".work" / "scan"
    counts, scanned = scan_all(corpus, inputs, work, held_folder, pool, progress)
    merge_rejected(inputs, out)
    check_bad(corpus, counts, out / "rejected")
    files = select(scanned)

    sources: dict[str, dict[str, Any]] = {}
    for name, row in counts.items():
        of_source = [f for f in files if f.source == name]
        language, domain = name.split("/")
        kept = sum(int(f.keep.sum()) for f in of_source)
        duplicates = sum(f.duplicates for f in of_source)
        assert row["read"] == kept + duplicates + sum(row["rejected"].values()), name
        if not kept:
            raise UserError(
                f"source {name} has no document left: {row['read']} read, {duplicates} "
                f"duplicates, rejected {row['rejected'] or 0}; see {out / 'rejected'}"
            )
        sources[name] = {
            "language": language,
            "domain": domain,
            "documents_read": row["read"],
            "documents": kept,
            "characters": sum(int(f.characters[f.keep].sum()) for f in of_source),
            "bytes": sum(int(f.bytes[f.keep].sum()) for f in of_source),
            "tokens": 0,
            "records": 0,
            "shards": [],
            "rejected": row["rejected"],
            "duplicates": duplicates,
            "held_out": row["held_out"],
            "damaged": row["damaged"],
        }
    model = out / "tokenizer.model"
    if not model.exists():
        if corpus.tokenizer.model:
            Tokenizer(corpus.tokenizer.model).save(model)
        else:
            list(pool.run(fit_tokenizer, [(corpus, files, model)]))
    tokenizer = Tokenizer(model)

    plan = plan_shards(files, corpus.shard_bytes)
    tokenise_all(corpus, out, sources, plan, tokenizer.vocab_size, pool, progress)
    return {
        "format": FORMAT,
        "cleaning": CLEANING,
        "record_tokens": corpus.record_tokens,
        "dtype": "uint16" if token_dtype(tokenizer.vocab_size) == "<u2" else "uint32",
        "languages": list(cfg.languages),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "sources": sources,
        "heldout": in_heldout,
    }


def scan_all(
    cfg: CorpusConfig,
    inputs: Sequence[Input],
    work: Path,
    heldout: Path | None,
    pool: Pool,
    progress: bool,
) -> tuple[dict[str, dict[str, Any]], list[tuple[str, Path]]]:
    """Counts by source, and (source, folder of the scan) of each input."""
    folders = [work / str(i) for i in range(len(inputs))]
    sizes = [sum(os.path.getsize(p) for p in item.files) for item in inputs]
    remove = cfg.held_out_copies == "remove"
    contamination.cache_clear()  # the folder may have been another corpus's
    jobs = [
        (item, folder, cfg.min_chars, cfg.shard_bytes, heldout, remove)
        for item, folder in zip(inputs, folders, strict=True)
    ]
    results: list[dict[str, Any]] = [{}] * len(jobs)
    with progress_bar("read", sum(sizes), progress) as bar:
        documents = 0
        for i, done in pool.run(scan, jobs):
            results[i] = done
            documents += done["read"]
            bar.set_postfix_str(f"{documents} documents", refresh=False)
            bar.update(sizes[i])
    counts: dict[str, dict[str, Any]] = {}
    for item, done in zip(inputs, results, strict=True):
        empty = {"read": 0, "rejected": {}, "held_out": {}, "bad": "", "damaged": []}
        row = counts.setdefault(item.source, empty)
        row["read"] += done["read"]
        row["damaged"] += done["damaged"]
        for key in ("rejected", "held_out"):
            both = Counter(row[key]) + Counter(done[key])
            row[key] = dict(sorted(both.items()))
        row["bad"] = row["bad"] or done["bad"]
        if done["bad"] and progress:
            print(
                f"left out of {item.source}: {done['rejected']}, first: {done['bad']}",
                file=sys.stderr,
            )
        for damage in done["damaged"] if progress else ():
            print(f"DAMAGED: {item.source} {told_damage(damage)}", file=sys.stderr)
    return counts, [(i.source, f) for i, f in zip(inputs, folders, strict=True)]


def progress_bar(what: str, size: int, progress: bool) -> tqdm:
    return tqdm(
        total=size,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
    )


def merge_rejected(inputs: Sequence[Input], out: Path) -> None:
    """rejected/<lang>.<domain>.jsonl from the scans, for sources that have some."""
    for source in dict.fromkeys(item.source for item in inputs):
        parts = [
            out / ".work" / "scan" / str(i) / "rejected.jsonl"
            for i, item in enumerate(inputs)
            if item.source == source
        ]
        if any(p.stat().st_size for p in parts):
            path = out / "rejected" / f"{source.replace('/', '.')}.jsonl"
            with atomic(path) as temporary, open(temporary, "wb") as f:
                for part in parts:
                    with open(part, "rb") as rows:
                        shutil.copyfileobj(rows, f)


def check_bad(cfg: CorpusConfig, counts: Mapping[str, Any], rejected: Path) -> None:
    """Raise UserError for damaged files, sources without documents or too bad ones."""
    for name, row in counts.items():
        if row["damaged"] and cfg.on_damaged_file == "stop":
            raise UserError(
                f"source {name}: {len(row['damaged'])} of its files damaged, first "
                f"{told_damage(row['damaged'][0])}; copy them again, or set "
                'corpus.on_damaged_file="keep_readable" to do without what is lost'
            )
        if not row["read"]:
            raise UserError(f"source {name} has no documents: check its files")
        reasons = {k: n for k, n in row["rejected"].items() if k not in HARMLESS}
        bad = sum(reasons.values())
        if bad > cfg.max_bad_share * row["read"]:
            listed = ", ".join(f"{n} {k}" for k, n in reasons.items())
            raise UserError(
                f"source {name}: {bad} of {row['read']} documents cannot be used "
                f"({listed}), first {row['bad']}; all are in "
                f"{rejected / name.replace('/', '.')}.jsonl; correct the source, or "
                f"raise corpus.max_bad_share={cfg.max_bad_share}"
            )


def tokenise_all(
    cfg: CorpusConfig,
    out: Path,
    sources: dict[str, dict[str, Any]],
    plan: Mapping[str, list[list[Part]]],
    vocab_size: int,
    pool: Pool,
    progress: bool,
) -> None:
    """Write all shards and token counts; fill in `sources`."""
    jobs, owners = [], []
    for name, shards in plan.items():
        for number, parts in enumerate(shards):
            file = f"sources/{name}/{number:05d}.arrayrecord"
            marker = out / ".work" / "shards" / name / f"{number:05d}.json"
            owners.append((name, file, marker))
            jobs.append(
                (out / "tokenizer.model", parts, cfg.record_tokens, out / file, marker)
            )
    results: list[dict[str, Any]] = [{}] * len(jobs)
    total = sum(s["bytes"] for s in sources.values())
    with progress_bar("tokenise", total, progress) as bar:
        documents = 0
        for i, done in pool.run(tokenise, jobs):
            results[i] = done
            documents += done["documents"]
            bar.set_postfix_str(f"{documents} documents", refresh=False)
            bar.update(done["bytes"])
    totals = {name: np.zeros(vocab_size, np.int64) for name in sources}
    seen: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for (name, file, marker), done in zip(owners, results, strict=True):
        totals[name] += np.load(marker.with_suffix(".npy"))
        seen[name].update({k: done[k] for k in ("documents", "characters", "bytes")})
        shard = {"file": file} | {k: done[k] for k in ("records", "tokens", "sha256")}
        sources[name]["shards"].append(shard)
        sources[name]["tokens"] += done["tokens"]
        sources[name]["records"] += done["records"]
    for name, source in sources.items():
        assert all(seen[name][k] == source[k] for k in seen[name]), name
        path = out / "sources" / name / "token_counts.npy"
        with atomic(path) as temporary, open(temporary, "wb") as f:
            np.save(f, totals[name])
    # Temporary files of jobs that were killed.
    for stray in (*out.glob(".*.tmp"), *out.glob("*/**/.*.tmp")):
        stray.unlink(missing_ok=True)


def train_tokenizer(
    cfg: CorpusConfig, out: Path, workers: int | None = None, progress: bool = True
) -> Path:
    """Train the tokenizer that `build` would, without the corpus; returns its path."""
    out = Path(out)
    inputs = [item for source in cfg.sources for item in expand(source)]
    if not inputs:
        raise UserError("corpus.sources is empty: the tokenizer needs text")
    heldout, _ = read_heldout(cfg)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=out.parent) as work:
        with Pool(workers) as pool:
            held_folder = Path(work, "heldout") if heldout else None
            write_heldout(heldout, Path(work, "heldout"))
            scans = Path(work, "scan")
            counts, scanned = scan_all(cfg, inputs, scans, held_folder, pool, progress)
            check_bad(cfg, counts, Path(work))
            list(pool.run(fit_tokenizer, [(cfg, select(scanned), out)]))
    return out
