"""Building a corpus: from a recipe and its documents to a finished folder.

Three steps, each in parallel and each restartable (see build_jobs): scan the input
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
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import AnyPath, Config, CorpusConfig, UserError
from gamayun_jax.data import heldout_sets
from gamayun_jax.data.build_jobs import (
    ShardPlan,
    contamination,
    fit_tokenizer,
    plan_shards,
    scan,
    tokenise,
)
from gamayun_jax.data.cleaning import CLEANING
from gamayun_jax.data.corpus import FORMAT, Corpus, open_corpus, token_dtype
from gamayun_jax.data.documents import HARMLESS, Input
from gamayun_jax.data.files import atomic, lock, read_json, write_json
from gamayun_jax.data.heldout_sets import HeldoutSet, read_heldout, write_heldout
from gamayun_jax.data.inputs import expand
from gamayun_jax.data.inspect_corpus import told_damage
from gamayun_jax.data.model_tokenizer import folder_tokenizer, given_tokenizer
from gamayun_jax.data.recipe import check_model, check_recipe, recipe_of
from gamayun_jax.data.selection import Scanned, select
from gamayun_jax.data.tokenizer_parity import tuning_texts
from gamayun_jax.data.worker_pool import Pool
from gamayun_jax.storage import is_bucket


def build(
    cfg: Config, out: AnyPath, workers: int | None = None, progress: bool = True
) -> Corpus:
    """Build the corpus of `cfg.corpus` in the folder `out`, or go on with it.

    Kill it at any time and run it again: finished work is kept and the result is the
    same. `workers` is the number of processes (default: the cores of this machine).
    Progress and what was left out go to stderr.

    Raises:
      UserError: bad config or input, a folder that holds another corpus, a full disk.
    """
    if is_bucket(out):
        raise UserError(
            f"corpus {out}: a corpus is built on this machine: give a local folder, "
            f"then `gamayun corpus copy FOLDER {out}`"
        )
    out = Path(out)
    check_recipe(cfg)
    inputs = [item for source in cfg.corpus.sources for item in expand(source)]
    heldout = read_heldout(cfg.corpus)
    check_model(cfg.corpus)
    tuning_texts(cfg.corpus.tokenizer, heldout, trained_languages(inputs))
    recipe, described = recipe_of(cfg, inputs, heldout)
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=False)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    busy = f"corpus {out} is being built by another process"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock(out, UserError(f"{busy}: wait for it")):
            if not find_former(out, fingerprint):
                with Pool(workers, progress) as pool:
                    manifest = make(cfg, out, inputs, heldout, pool)
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


def trained_languages(inputs: Sequence[Input]) -> list[str]:
    """Languages of the sources, in their order."""
    return list(dict.fromkeys(item.source.split("/")[0] for item in inputs))


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
                    "with other rules for cleaning text): train on it as it is with "
                    "`gamayun train`; or delete it, or give another --out, to build "
                    "by the present rules"
                )
            raise UserError(
                f"{out} holds {what} of another recipe (config or input files "
                "differ): give another --out, or delete it first"
            )
    for name in ("sources", "heldout", "rejected", "tokenizer.model", "tokenizer.json"):
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
    heldout: Sequence[HeldoutSet],
    pool: Pool,
) -> dict[str, Any]:
    """Everything of a build but the manifest, which it returns."""
    corpus, held_folder = cfg.corpus, out / "heldout"
    write_heldout(heldout, held_folder)
    copies, max_units = corpus.held_out_copies, cfg.evaluation.max_units
    held_entries = {
        h.name: heldout_sets.describe(h, held_folder, copies, max_units)
        for h in heldout
    }
    work = out / ".work" / "scan"
    counts, scans = scan_all(
        corpus, inputs, work, held_folder if heldout else None, pool
    )
    merge_rejected(scans, out / "rejected")
    check_bad(corpus, counts, out / "rejected")
    scanned, shared_ids = select(corpus, scans)
    sources = {
        name: source_entry(name, row, [s for s in scanned if s.source == name], out)
        for name, row in counts.items()
    }
    model, evened = out / "tokenizer.model", out / ".work" / "tokenizer.json"
    if corpus.tokenizer.model:
        given_tokenizer(Path(corpus.tokenizer.model)).write(out)
    elif not model.exists():
        list(pool.run(fit_tokenizer, [(corpus, scanned, heldout, model, evened)]))
    tokenizer = folder_tokenizer(out)
    parity = {"parity": read_json(evened, "")} if corpus.tokenizer.parity_set else {}
    shards = plan_shards(scanned, corpus.shard_bytes)
    tokenise_all(corpus, out, sources, shards, tokenizer.vocab_size, pool)
    disjoint = {"seed": corpus.disjoint_seed, "shared_ids": shared_ids}
    return {
        "format": FORMAT,
        "cleaning": CLEANING,
        **({"disjoint": disjoint} if shared_ids else {}),
        "record_tokens": corpus.record_tokens,
        "dtype": "uint16" if token_dtype(tokenizer.vocab_size) == "<u2" else "uint32",
        "languages": list(cfg.languages),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            **parity,
        },
        "sources": sources,
        "heldout": held_entries,
    }


def scan_all(
    cfg: CorpusConfig,
    inputs: Sequence[Input],
    work: Path,
    heldout: Path | None,
    pool: Pool,
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
    results = pool.run_all(scan, jobs, sizes, "read", "read")
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
        if done["bad"] and pool.progress:
            print(
                f"left out of {item.source}: {done['rejected']}, first: {done['bad']}",
                file=sys.stderr,
            )
        for damage in done["damaged"] if pool.progress else ():
            print(f"DAMAGED: {item.source} {told_damage(damage)}", file=sys.stderr)
    return counts, [(i.source, f) for i, f in zip(inputs, folders, strict=True)]


def merge_rejected(scans: Sequence[tuple[str, Path]], folder: Path) -> None:
    """<lang>.<domain>.jsonl from the scans, for sources that have some."""
    for source in dict(scans):
        parts = [f / "rejected.jsonl" for name, f in scans if name == source]
        if any(p.stat().st_size for p in parts):
            path = folder / f"{source.replace('/', '.')}.jsonl"
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


def source_entry(
    name: str, row: Mapping[str, Any], scanned: Sequence[Scanned], out: Path
) -> dict[str, Any]:
    """The manifest's entry of a source; `tokenise_all` adds its shards.

    Raises:
      UserError: none of its documents is left.
    """
    language, domain = name.split("/")
    kept = sum(int(s.keep.sum()) for s in scanned)
    duplicates = sum(s.duplicates for s in scanned)
    translations = sum(s.translations for s in scanned)
    left_out = duplicates + translations + sum(row["rejected"].values())
    assert row["read"] == kept + left_out, name
    if not kept:
        raise UserError(
            f"source {name} has no document left: {row['read']} read, {duplicates} "
            f"duplicates, {translations} in another language, rejected "
            f"{row['rejected'] or 0}; see {out / 'rejected'}"
        )
    return {
        "language": language,
        "domain": domain,
        "documents_read": row["read"],
        "documents": kept,
        "characters": sum(int(s.characters[s.keep].sum()) for s in scanned),
        "bytes": sum(int(s.bytes[s.keep].sum()) for s in scanned),
        "tokens": 0,
        "records": 0,
        "shards": [],
        "rejected": row["rejected"],
        "duplicates": duplicates,
        **({"translations": translations} if translations else {}),
        "held_out": row["held_out"],
        "damaged": row["damaged"],
    }


def tokenise_all(
    cfg: CorpusConfig,
    out: Path,
    sources: dict[str, dict[str, Any]],
    plan: Mapping[str, Sequence[ShardPlan]],
    vocab_size: int,
    pool: Pool,
) -> None:
    """Write all shards and token counts; fill in `sources`."""
    jobs, sizes, places = [], [], []
    for name, shards in plan.items():
        for number, shard in enumerate(shards):
            file = f"sources/{name}/{number:05d}.records"
            marker = out / ".work" / "shards" / name / f"{number:05d}.json"
            job = (out, shard.parts, cfg.record_tokens, out / file)
            jobs.append((*job, marker))
            sizes.append(shard.bytes)
            places.append((name, file, marker))
    results = pool.run_all(tokenise, jobs, sizes, "tokenise", "documents")
    totals = {name: np.zeros(vocab_size, np.int64) for name in sources}
    seen: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for (name, file, marker), done in zip(places, results, strict=True):
        totals[name] += np.load(marker.with_suffix(".npy"))
        seen[name].update({k: done[k] for k in ("documents", "characters", "bytes")})
        entry = {"file": file} | {k: done[k] for k in ("records", "tokens", "sha256")}
        sources[name]["shards"].append(entry)
        sources[name]["tokens"] += done["tokens"]
        sources[name]["records"] += done["records"]
        if found := done.get("control_texts"):  # of chats
            both = Counter(found) + Counter(sources[name].get("control_texts"))
            sources[name]["control_texts"] = dict(sorted(both.items()))
    for name, source in sources.items():
        assert all(seen[name][k] == source[k] for k in seen[name]), name
        path = out / "sources" / name / "token_counts.npy"
        with atomic(path) as temporary, open(temporary, "wb") as f:
            np.save(f, totals[name])
    # Temporary files of jobs that were killed, shards of a former version's build.
    strays = (".*.tmp", "*/**/.*.tmp", "sources/*/*/*.arrayrecord")
    for stray in (path for pattern in strays for path in out.glob(pattern)):
        stray.unlink(missing_ok=True)


def train_tokenizer(
    cfg: CorpusConfig, out: AnyPath, workers: int | None = None, progress: bool = True
) -> Path:
    """Train the tokenizer that `build` would, without the corpus; returns its path."""
    out = Path(out)
    inputs = [item for source in cfg.sources for item in expand(source)]
    if not inputs:
        raise UserError("corpus.sources is empty: the tokenizer needs text")
    heldout = read_heldout(cfg)
    tuning_texts(cfg.tokenizer, heldout, trained_languages(inputs))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=out.parent) as temporary:
        work = Path(temporary)
        write_heldout(heldout, work / "heldout")
        with Pool(workers, progress) as pool:
            held_folder = work / "heldout" if heldout else None
            counts, scans = scan_all(cfg, inputs, work / "scan", held_folder, pool)
            check_bad(cfg, counts, work)
            scanned = select(cfg, scans)[0]
            job = (cfg, scanned, heldout, out, work / "tokenizer.json")
            list(pool.run(fit_tokenizer, [job]))
    return out
