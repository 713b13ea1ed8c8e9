"""Inspecting a corpus: a summary for a person to read, and a check of every byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.files import file_sha256
from gamayun_jax.data.records import COPY_AGAIN


def verify(corpus: Corpus) -> None:
    """Read everything: hashes of shards and held-out files, counts of tokens.

    Raises:
      UserError: naming the first file that is not as the manifest says.
    """

    def expect(what: Path | str, found: Any, expected: Any) -> None:
        if found != expected:
            raise UserError(
                f"{what}: found {found}, the manifest says {expected}: {COPY_AGAIN}"
            )

    boundaries = corpus.tokenizer().boundaries
    for name, languages in corpus.heldout_sets().items():
        for language in languages:
            path = corpus.folder / "heldout" / f"{name}.{language}.jsonl"
            row = corpus.manifest["heldout"][name]["languages"][language]
            corpus.heldout(name, language)
            expect(path, file_sha256(path), row["sha256"])
    for name, source in corpus.manifest["sources"].items():
        tokens = len(source["shards"])  # a shard's first token is no target
        documents = 0
        for row in source["shards"]:
            path = corpus.folder / row["file"]
            expect(path, file_sha256(path), row["sha256"])
        for record in corpus.records(name):
            expect(name, len(record), corpus.manifest["record_tokens"] + 1)
            tokens += boundaries.tokens(record)
            documents += boundaries.documents(record)
        expect(f"tokens of {name}", tokens, source["tokens"])
        expect(f"documents of {name}", documents, source["documents"])
        counts = corpus.token_counts(name)
        expect(f"token counts of {name}", int(counts.sum()), source["tokens"])


def told_damage(damage: Mapping[str, Any]) -> str:
    """The manifest's entry of a damaged input file, in words."""
    unread = damage["unread"]
    lost = "what follows" if unread is None else f"{unread:,} documents"
    return (
        f"{damage['file']}: {damage['reason']} after document {damage['after']:,}, "
        f"{lost} not read ({damage['detail']})"
    )


def told_copies(manifest: Mapping[str, Any], name: str) -> list[str]:
    """The manifest's findings on a held-out set, in words: copies in the training
    documents, and whether it is parallel."""
    held = manifest["heldout"][name]
    told = [
        f"WARNING: units of {k} and of the first language are unlike in length "
        f"(correlation {r}): are they translations, in the same order?"
        for k, r in held.get("unlike_lengths", {}).items()
    ]
    if len(held["languages"]) > 1 and (why := held.get("unlike_ids")):
        told.append(
            f"not parallel, since {why}: no parity, no alignment of it (if they are "
            "translations, give the same ids in the same order, or parallel=True)"
        )
    if "copies" not in held:  # of a former version
        return [*told, "only documents equal to one of its texts were looked for"]
    sources = manifest["sources"].items()
    copies = {k: s["held_out"][name] for k, s in sources if name in s["held_out"]}
    listed = ", ".join(f"{n:,} of {k}" for k, n in copies.items())
    done = "removed" if held["copies"] == "remove" else "reported, not removed"
    short = sum(row["short"] for row in held["languages"].values())
    units = sum(row["units"] for row in held["languages"].values())
    line = f"{sum(copies.values()):,} documents with its texts {done}"
    told.append(f"{line}: {listed}" if copies else "no document has any of its texts")
    if short:
        told.append(
            f"{short:,} of {units:,} texts are too short to be looked for inside of "
            "documents"
        )
    return told


def inspect(path: str | Path) -> str:
    """A table of what a corpus holds, and the beginning of a record of each source."""
    corpus = open_corpus(path)
    m = corpus.manifest
    tokenizer = corpus.tokenizer()
    text = [
        f"corpus {corpus.folder}: records of {m['record_tokens']} tokens "
        f"({m['dtype']}), tokenizer {tokenizer.fingerprint[:12]} of "
        f"{tokenizer.vocab_size} pieces, recipe {m['recipe'][:12]}",
        corpus.table().text(width=1000),
    ]
    for name, s in m["sources"].items():
        for damage in s.get("damaged", ()):
            text.append(f"DAMAGED: {name} {told_damage(damage)}")
        if found := s.get("control_texts"):
            listed = ", ".join(f"{token} ({n:,})" for token, n in found.items())
            text.append(
                f"{name}: of {s['documents']:,} documents some spell control tokens, "
                f"which are text in a corpus: {listed}. A model does not learn from "
                "them to answer in turns"
            )
    if found := m.get("disjoint"):
        left = {k: s.get("translations") for k, s in m["sources"].items()}
        listed = ", ".join(f"{n:,} of {k}" for k, n in left.items() if n)
        text.append(
            f"disjoint languages: {found['shared_ids']:,} ids were in several, each "
            f"stays in one; documents left out: {listed}"
        )
    for name, languages in corpus.heldout_sets().items():
        rows = m["heldout"][name]["languages"]
        kind = "parallel" if m["heldout"][name]["parallel"] else "not parallel"
        units = sorted({rows[k]["units"] for k in languages})
        count = f"{units[0]}" if len(units) == 1 else f"{units[0]} to {units[-1]}"
        text.append(f"held out {name} ({kind}): {count} units in {' '.join(languages)}")
        text += [f"  {line}" for line in told_copies(m, name)]
    for name in corpus.sources:
        begin = tokenizer.decode(corpus.records(name)[0].tolist())
        text.append(f"{name}: {' / '.join(begin.split(chr(10))[:3])[:100]}")
    return "\n".join(text)
