"""The exposure ledger: what a run was to see of each source and language, and has seen.

Everything is read from records: a run's lineage has its plan and the sizes of its
sources, its last record (or its checkpoint) how many examples of each were served, and
the records' sums by language what the steps themselves counted.

  examples  a plan's counts, exact
  tokens    examples x seq_len
  targets   tokens that are predicted: as many as a whole pass has, by the tokens and
            documents of the source, so an expected number; `counted` has the exact one,
            by language only
  epochs    examples / the source's examples
  repeats   examples that were served before: those beyond the first pass, which a
            former run may have begun. Where a stage restarts its cursors it is a lower
            bound, since a part of a pass in another order may repeat too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gamayun_jax.tables import Cell, Table


@dataclass(frozen=True)
class SourceSize:
    """What turns a source's count of examples into the rest.

    Attributes:
      examples: in one pass; 0: not known.
      targets: mean of an example; None: not known.
      before: examples that former runs have served, where this one goes on from there.
    """

    examples: int
    targets: float | None = None
    before: int = 0


def grouped(sources: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Rows of a ledger: (label, sources together). Each source; below those of a
    language that has several, all of them; all at the end."""
    names = list(sources)
    rows = []
    for language, of in by_language(names).items():
        rows += [(name, [name]) for name in of]
        rows += [(f"{language}, all", of)] if len(of) > 1 else []
    return [*rows, ("all", names)]


def by_language(sources: Iterable[str]) -> dict[str, list[str]]:
    """Language -> its sources."""
    found: dict[str, list[str]] = {}
    for name in sources:
        found.setdefault(name.split("/")[0], []).append(name)
    return found


def exposure(
    counts: Mapping[str, int],
    sizes: Mapping[str, SourceSize],
    names: Sequence[str],
    seq_len: int,
) -> dict[str, Any]:
    """What some sources' counts of examples amount to together; None: not known."""
    total = sum(counts.get(n, 0) for n in names)
    row: dict[str, Any] = {"examples": total, "tokens": total * seq_len}
    row |= dict.fromkeys(("targets", "epochs", "repeats", "repeated_share"))
    known = [(counts.get(n, 0), sizes[n]) for n in names if n in sizes]
    if len(known) < len(names):
        return row
    if all(size.targets is not None for _, size in known):
        row["targets"] = round(sum(n * (size.targets or 0.0) for n, size in known))
    whole = sum(size.examples for _, size in known)
    if whole:
        row["epochs"] = total / whole
        again = sum(
            max(0, size.before + n - size.examples)
            - max(0, size.before - size.examples)
            for n, size in known
        )
        row |= {"repeats": again, "repeated_share": again / total if total else 0.0}
    return row


def source_sizes(lineage: Mapping[str, Any], seq_len: int) -> dict[str, SourceSize]:
    """Of each source of a run, from its lineage. Those of former releases do not say
    how many examples and targets a source has: then from the plan's epochs, and from
    documents."""
    table = lineage.get("curriculum", {}).get("table", [])
    first: Mapping[str, Any] = next(iter(lineage.get("transitions", {}).values()), {})
    origin = lineage.get("init_from") or {}
    before = origin.get("cursors", {}) if first.get("cursors") == "continue" else {}
    sizes = {}
    for name, info in lineage.get("corpus", {}).get("sources", {}).items():
        examples = info.get("examples") or next(
            (
                round(r["tokens"] / seq_len / r["epochs"])
                for r in table
                if r["source"] == name and r.get("epochs")
            ),
            0,
        )
        targets = info.get("targets")
        if targets is None and "documents" in info:
            targets = info["tokens"] - info["documents"]  # all but BOS
        known = examples and targets is not None
        mean = targets / examples if known else None
        sizes[name] = SourceSize(examples, mean, before.get(name, 0))
    return sizes


def make_ledger(
    lineage: Mapping[str, Any],
    seq_len: int,
    served: Mapping[str, int],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The ledger of a run, as plain JSON.

    Args:
      lineage: as in lineage.json.
      served: source -> examples that the run has served.
      records: of training, all up to there; what they lack is not counted.

    Returns:
      sources, languages (of several sources too) and all: each {"planned", "served"},
      by `exposure`; a language also has "counted": tokens and targets as the records
      have them. stages: by `objective_stages`.
    """
    planned: dict[str, int] = {}
    for r in lineage.get("curriculum", {}).get("table", []):
        planned[r["source"]] = planned.get(r["source"], 0) + r["tokens"] // seq_len
    sizes = source_sizes(lineage, seq_len)
    names = list(dict.fromkeys([*planned, *served]))

    def row(of: Sequence[str]) -> dict[str, Any]:
        return {
            "planned": exposure(planned, sizes, of, seq_len),
            "served": exposure(served, sizes, of, seq_len),
        }

    counted = language_sums(records, ("tokens", "targets"))
    return {
        "seq_len": seq_len,
        "sources": {
            n: {"size": sizes[n].examples if n in sizes else None, **row([n])}
            for n in names
        },
        "languages": {
            k: {**row(of), "counted": counted.get(k)}
            for k, of in by_language(names).items()
        },
        "all": row(names),
        "stages": objective_stages(lineage, records),
    }


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """Each source, the languages that have several, and all. "~" is before a number of
    targets that is expected, not counted."""
    heads = ("source", "planned", "served", "tokens", "targets", "epochs planned",
             "epochs", "repeats")  # fmt: skip
    body: list[list[Cell]] = []
    foot: list[list[Cell]] = []
    every = by_language(ledger["sources"])
    for label, of in grouped(ledger["sources"]):
        languages = by_language(of)
        row = ledger["all"] if label == "all" else ledger["sources"][of[0]]
        if label != "all" and len(of) > 1:
            row = ledger["languages"][next(iter(languages))]
        # Targets are counted by language, so of a source where it has one alone.
        whole = all(set(of) >= set(every[k]) for k in languages)
        targets = counted_targets(ledger, languages) if whole else None
        planned, served = row["planned"], row["served"]
        about = "~" if targets is None else ""
        targets = served["targets"] if targets is None else targets
        cells = [
            Cell(label),
            cell(planned["examples"]),
            cell(served["examples"]),
            cell(served["tokens"]),
            cell(targets, about),
            cell(planned["epochs"], form=".2f"),
            cell(served["epochs"], form=".2f"),
            cell(served["repeated_share"], form=".1%"),
        ]
        (foot if label == "all" else body).append(cells)
    return Table(heads, body, foot)


def objective_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Share of tokens, and of the objective as planned and achieved, by language and
    stage; below, the effective sample size.

    Args:
      stages: by `objective_stages`.
    """
    names = list(dict.fromkeys(k for s in stages for k in s["languages"]))
    heads, body, foot = ["language"], [[Cell(k)] for k in names], [Cell("effective")]
    for stage in stages:
        keys = ("tokens", "planned", "achieved")
        heads += [f"{stage['stage']}, {key}" for key in keys]
        for name, row in zip(names, body, strict=True):
            found = stage["languages"].get(name, {})
            row += [cell(found.get(key), form=".2%") for key in keys]
        foot += [Cell(""), Cell(""), cell(stage["effective_share"], form=".2%")]
    return Table(heads, body, [foot])


def cell(value: float | None, about: str = "", form: str = ",") -> Cell:
    """A number that may not be known."""
    return Cell() if value is None else Cell(f"{about}{value:{form}}", value=value)


def counted_targets(ledger: Mapping[str, Any], languages: Iterable[str]) -> int | None:
    """Targets of some languages together; None unless the records count all of them."""
    missing = uncounted(ledger)
    rows = [ledger["languages"][k]["counted"] or {"targets": 0} for k in languages]
    return None if missing else sum(row["targets"] for row in rows)


def uncounted(ledger: Mapping[str, Any]) -> dict[str, tuple[int, int | None]]:
    """Language -> (tokens that the plan served, tokens that the records count), where
    they are not the same: records are missing or damaged."""
    pairs = {
        k: (row["served"]["tokens"], (row["counted"] or {}).get("tokens"))
        for k, row in ledger["languages"].items()
    }
    return {k: (a, b) for k, (a, b) in pairs.items() if a != (b or 0)}


def language_sums(
    records: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Language -> the sums over records of some of its numbers."""
    sums: dict[str, dict[str, float]] = {}
    for record in records:
        for language, row in (record.get("languages") or {}).items():
            of = sums.setdefault(language, dict.fromkeys(names, 0))
            for name in names:
                of[name] += row.get(name) or 0
    return sums


def objective_stages(
    lineage: Mapping[str, Any], records: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What share of the objective each language was to have in each stage, and had.

    Returns:
      of each stage with records of it: its name; `targets`, and what Kish's effective
      sample size is of them, `effective_share`; `languages`: name -> {"tokens": share
      of the tokens, "planned": share of the objective by the stage's mixture and token
      weights, "achieved": by the weights of the targets themselves}. A ramp is not in
      the planned share. None: not recorded.
    """
    planned = lineage.get("curriculum", {}).get("objective", {})
    stages = []
    for name, group in itertools.groupby(records, lambda r: r.get("stage")):
        of = list(group)
        sums = language_sums(of, ("tokens", "weight"))
        tokens = sum(row["tokens"] for row in sums.values())
        weight = sum(row["weight"] for row in sums.values())
        parts = [r.get("objective") or {} for r in of]
        targets, squares = (
            sum(part.get(key) or 0 for part in parts)
            for key in ("targets", "squared_weights")
        )
        most = targets * squares
        stages.append(
            {
                "stage": name,
                "targets": targets,
                "effective_share": weight**2 / most if most else None,
                "languages": {
                    k: {
                        "tokens": row["tokens"] / tokens if tokens else None,
                        "planned": planned.get(name, {}).get(k),
                        "achieved": row["weight"] / weight if weight else None,
                    }
                    for k, row in sums.items()
                },
            }
        )
    return stages
