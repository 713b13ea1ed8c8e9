"""Tables, text and files of a study: what the terminal and the page show alike."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.data.files import write_json, write_text
from gamayun_jax.report.formats import fixed, interval_text, plain, short
from gamayun_jax.report.read_run import entries, get, num, rows
from gamayun_jax.study import findings
from gamayun_jax.study.analysis import CONTRADICTED, SUPPORTED, smallest_effect
from gamayun_jax.study.design import PER_BYTE
from gamayun_jax.study.findings import ArmRuns, Compared, Findings
from gamayun_jax.tables import Cell, Table

MARKS = {SUPPORTED: "better", CONTRADICTED: "worse"}


def p_text(p: float | None) -> str:
    return "–" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}"


def difference_cell(c: Compared) -> Cell:
    e = c.difference.estimate
    if not c.difference.n:
        return Cell()
    note = "" if e.low is None else interval_text(e, digits=4)
    return Cell(fixed(e.value, "+.4f"), note, value=e.value)


def runs_text(f: Findings) -> str:
    """ "12 of 96"."""
    return f"{f.planned - f.missing} of {f.planned}"


def pair_text(c: Compared) -> str:
    """ "staged − single"."""
    return f"{c.arm} − {c.than}"


def status_lines(f: Findings) -> list[str]:
    """What of the registered runs is not as it should be; none if all is."""
    told = []
    if f.other_rules:
        told.append(
            "The registered rules of the analysis are not those of this release, which "
            f"are applied here: {', '.join(f.other_rules)}."
        )
    if f.missing:
        told.append(
            f"Under way: {runs_text(f)} runs are there. What is shown may change; "
            "no hypothesis is judged before all are."
        )
        each = [
            f"{a.name} {', '.join(map(str, a.missing))}" for a in f.arms if a.missing
        ]
        told.append(f"Missing runs (arm and seeds): {'; '.join(each)}.")
    for a in f.arms:
        for seed, why in a.diverged.items():
            told.append(
                f"Arm {a.name}, seed {seed} DIVERGED and is left out with its pairs: "
                f"{plain(why, 160)}"
            )
        if a.other:
            told.append(
                f"Arm {a.name} is EXCLUDED from all comparisons, for its runs were not "
                f"as registered: {plain(a.other, 240)}."
            )
    return told


def sentence(f: Findings, c: Compared) -> str:
    """A hypothesis, what became of it, and with which numbers."""
    d, e = c.difference, c.difference.estimate
    told = [f"{c.name}: {c.verdict.upper()}. {c.claim.rstrip('.')}:"]
    if not d.n:
        return f"{told[0]} no pair of runs to compare."
    told.append(f"{pair_text(c)} is {fixed(e.value, '+.4f')} {f.unit(c.outcome)}")
    if e.low is not None:
        told.append(f"(95 %: {interval_text(e, digits=4)})")
    told.append(f"over {d.n} seeds")
    if c.p_adjusted is not None:
        told.append(f"(p adjusted by Holm {p_text(c.p_adjusted)})")
    text = " ".join(told) + "."
    if c.verdict not in MARKS and d.smallest is not None:
        text += (
            f" An effect of {d.smallest:.4f} would have been found with 80 % power; a "
            "smaller one may be there."
        )
    least, ends = f.study.get("worthwhile") or 0.0, (e.low, e.high)
    primary = c.outcome == f.study["primary"]
    if primary and all(x is not None and abs(x) < least for x in ends):
        text += f" A difference of {least:g}, which would matter, is excluded."
    if c.left_out:
        text += f" Left out for divergence: seeds {', '.join(map(str, c.left_out))}."
    return text


def hypothesis_table(f: Findings) -> Table:
    """The registered comparisons with their verdicts."""
    body: list[list[Cell | str]] = []
    for c in f.hypotheses:
        # Neither is "within noise", which the mark of "same" would say.
        d, mark = c.difference, MARKS.get(c.verdict, "")
        smallest = fixed(d.smallest, ".4f")
        body.append(
            [
                Cell(plain(c.name, 24), below=pair_text(c)),
                Cell(c.verdict, verdict=mark), difference_cell(c),
                p_text(c.p_adjusted), p_text(d.signs), str(d.n),
                Cell(smallest, value=d.smallest), c.outcome,
            ]
        )  # fmt: skip
    heads = ("hypothesis", "verdict", "difference", "p (Holm)", "p (signs)", "seeds",
             "smallest effect", "outcome")  # fmt: skip
    return Table(heads, body)


def mean_lines(f: Findings) -> dict[str, str]:
    """Outcome -> what languages its mean is over, where a set lacks some of those that
    the outcome is about; known once a run is there."""
    of_study = (k for a in f.arms for k in a.plan["config"]["languages"])
    known, found = list(dict.fromkeys(of_study)), {}
    for o in f.outcomes:
        wanted, told = o.languages_of(known), []
        for name in o.sets:
            has = {k for corpus in f.units.values() for k in corpus.get(name, ())}
            if has and (missing := [k for k in wanted if k not in has]):
                over = ", ".join(k for k in wanted if k in has)
                told.append(f"{name} has no {', '.join(missing)}: the mean of {over}")
        if told:
            found[o.name] = plain(f"Outcome {o.name}: {'; '.join(told)}.", 600)
    return found


def noise_table(f: Findings) -> Table:
    """Mean and standard deviation over seeds of each arm in each outcome."""
    known: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in findings.noise(f):
        known.setdefault(row["arm"], {})[row["outcome"]] = row
    body: list[list[Cell | str]] = []
    for name, of_arm in known.items():
        seeds = max(r["n"] for r in of_arm.values())
        cells: list[Cell | str] = [plain(name, 40), str(seeds)]
        for r in of_arm.values():
            sd = "" if r["sd"] is None else f"sd {r['sd']:.4f}"
            cells.append(Cell(fixed(r["mean"], ".4f"), sd, value=r["mean"]))
        body.append(cells)
    part = mean_lines(f)
    heads = [
        o.name
        + ("" if f.unit(o.name) == PER_BYTE else f", {f.unit(o.name)}")
        + (" (not of all languages)" if o.name in part else "")
        for o in f.outcomes
    ]
    return Table(["arm", "seeds", *heads], body)


def power_table(f: Findings) -> Table:
    """What more seeds would show, at the spread of each registered difference."""
    counts = 4, 8, 16, 32
    body: list[list[Cell | str]] = []
    for c in f.hypotheses:
        sd = c.difference.sd
        if sd is not None:
            effects = [smallest_effect(sd, n) for n in counts]
            cells = [Cell(f"{x:.4f}", value=x) for x in effects]
            body.append([plain(c.name, 24), Cell(f"{sd:.4f}", value=sd), *cells])
    return Table(["hypothesis", "sd", *(f"{n} seeds" for n in counts)], body)


def exploratory_table(found: Iterable[Compared]) -> Table:
    """Comparisons that nobody registered; p is not corrected."""
    body: list[list[Cell | str]] = [
        [
            pair_text(c) if c.arm != c.than else f"{c.arm}: averaged − last", c.outcome,
            difference_cell(c), p_text(c.difference.estimate.p), str(c.difference.n),
        ]
        for c in found
        if c.difference.n
    ]  # fmt: skip
    return Table(["arms", "outcome", "difference", "p alone", "seeds"], body)


def ledger_table(f: Findings, curricula: Mapping[str, Any]) -> Table:
    """Tokens of each source by arm, and its epochs where they are known; a column for
    all arms that serve the same."""
    columns: dict[str, list[ArmRuns]] = {}
    for arm in f.arms:
        columns.setdefault(json.dumps(arm.plan["served"]), []).append(arm)
    groups = list(columns.values())
    heads = ["source"]
    for group in groups:
        names = [a.name for a in group]
        more = f" and {len(names) - 1} more" if names[1:] else ""
        heads.append(names[0] + more)
    sources = list(dict.fromkeys(s for a in f.arms for s in a.plan["served"]))
    languages = [s.split("/")[0] for s in sources]

    def row(name: str, of: Sequence[str]) -> list[Cell]:
        cells = [Cell(plain(name, 30))]
        for arm, *_ in groups:
            examples = sum(arm.plan["served"].get(s, 0) for s in of)
            tokens = examples * arm.plan["config"]["data"]["seq_len"]
            note, table = f"{examples:,} ex.", rows(curricula.get(arm.name), "table")
            passes = [num(r, "epochs_total") for r in table if [get(r, "source")] == of]
            if passes and passes[-1] is not None:
                note += f", {passes[-1]:.2f} ep."
            cells.append(Cell(short(tokens), note, value=tokens))
        return cells

    several = [k for k in dict.fromkeys(languages) if languages.count(k) > 1]
    sums = [
        (f"{k}, all", [s for s in sources if s.split("/")[0] == k]) for k in several
    ]
    foot = [row(*pair) for pair in (*sums, ("all", sources))]
    return Table(heads, [row(s, [s]) for s in sources], foot)


def made_with_table(f: Findings) -> Table:
    """Devices, versions and seconds of the runs that are done."""
    kinds: dict[tuple[str, ...], list[float]] = {}
    for arm in f.arms:
        for record in arm.done.values():
            made = entries(record, "made_with")
            versions = (f"{k} {v}" for k, v in entries(made, "versions").items())
            side = num(made, "side_by_side") or 0
            how = f"{side:.0f} side by side" if side else "alone"
            kind = plain(get(made, "device")), plain(get(made, "dtype"))
            key = (*kind, how, plain(", ".join(versions), 200))
            kinds.setdefault(key, []).append(num(made, "seconds") or 0.0)
    heads = ["device", "dtype", "runs", "trained", "seconds a run (median)", "versions"]
    body = [
        [
            key[0], key[1], str(len(each)), key[2], f"{statistics.median(each):,.0f}",
            key[3],
        ]
        for key, each in kinds.items()
    ]  # fmt: skip
    return Table(heads, body)


# --- text and files ---------------------------------------------------------------


def study_text(f: Findings) -> str:
    """What the terminal shows: status, verdicts and noise."""
    study = f.study
    parts = [
        f"study {plain(study['name'])}: {plain(study['question'], 400)}",
        f"registration {f.frozen['sha256'][:16]}, {runs_text(f)} runs; "
        f"primary outcome: {study['primary']}",
        *status_lines(f),
        "",
        hypothesis_table(f).text(),
        "",
        *(sentence(f, c) for c in f.hypotheses),
        "",
        "outcomes by arm, mean and standard deviation over seeds (bits per byte where "
        "nothing else is said)",
        noise_table(f).text(),
        *mean_lines(f).values(),
    ]
    return "\n".join(parts)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; a column for every key of any row."""
    heads = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_files(f: Findings, out: Path) -> None:
    """results.txt, results.json, comparisons.csv and runs.csv."""
    told = findings.to_json(f)
    kinds = ("hypotheses", "exploratory", "languages", "sizes", "averages")
    found = [
        {k: v for k, v in row.items() if k not in ("by_seed", "claim", "left_out")}
        for kind in kinds
        for row in told[kind]
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", told)
    write_text(out / "results.txt", study_text(f) + "\n")
    write_text(out / "comparisons.csv", csv_text(found))
    write_text(out / "runs.csv", csv_text(findings.runs(f)))
