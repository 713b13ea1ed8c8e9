"""Bits per byte on held-out sets, by language: the table of the terminal and of pages,
and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gamayun_jax.config import AnyPath
from gamayun_jax.evaluate.paired import MACRO, Estimate
from gamayun_jax.report.changes import BITS, Change, changes_between
from gamayun_jax.report.charts import Dot, Panel, dots_chart
from gamayun_jax.report.colours import language_cell
from gamayun_jax.report.formats import fixed, plain
from gamayun_jax.report.read_run import (
    BASELINES,
    Evaluation,
    averaged,
    beaten,
    get,
    label_of,
    languages_of,
    num,
    read_run,
    score,
    sets_of,
)
from gamayun_jax.tables import Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Column:
    """An evaluation in a table, and what it differs by from another."""

    head: str
    evaluation: Any
    versus: str = ""  # heading of the differences
    changes: Mapping[str, Change] | None = None  # by language; None: no such column


def set_changes(name: str, old: Evaluation, new: Evaluation) -> dict[str, Change]:
    """Language -> change of a held-out set (see `changes_between`); of the mean over
    all units, "micro", only the number, for it is no further test."""
    test = f"heldout-{name}"
    changes = {c.language: c for c in changes_between(old, new) if c.test == test}
    a, b = (num(score(e, name, "micro"), BITS) for e in (old, new))
    if a is not None and b is not None:
        changes["micro"] = Change(test, BITS, "micro", a, b, Estimate(b - a), "", False)
    return changes


def average_cells(evaluation: Any, name: str) -> dict[str, Cell]:
    """Language -> bits per byte of the average of the parameters, in small print what
    it differs by from the parameters themselves; none where the run kept no average."""
    average = averaged(evaluation)
    if not languages_of([average], name):
        return {}
    cells = {}
    for language, change in set_changes(name, evaluation, average).items():
        small = fixed(change.estimate.value, "+.3f")
        value = change.after
        cells[language] = Cell(fixed(value), small, value=value, verdict=change.verdict)
    return cells


def score_table(
    columns: Sequence[Column],
    name: str,
    languages: Sequence[str],
    baselines: Sequence[str] = (),
    intervals: bool = True,
) -> Table:
    """Bits per byte by language, with the means over languages and over units.

    Args:
      languages: all of the page.
      baselines: names of BASELINES: add the last evaluation's, accuracy and parity, and
        what the average of the parameters gives, where the run kept one.
      intervals: of the changes, in small print.
    """
    averages = average_cells(columns[-1].evaluation, name) if baselines else {}
    tested = languages_of((c.evaluation for c in columns), name)
    shown = [k for k in languages if k in tested]
    heads = ["language"]
    for c in columns:
        heads += [c.head] if c.changes is None else [c.head, c.versus]
    heads += ["average"] if averages else []
    if baselines:
        heads += [*(BASELINES[k] for k in baselines), "accuracy", "parity"]

    def row_of(i: int, language: str) -> list[Cell]:
        is_mean = i >= len(shown)
        row = [language_cell(i, language, is_mean)]
        last: dict[str, Any] = {}
        for c in columns:
            last = score(c.evaluation, name, language)
            error = num(last, "bits_per_byte_se")
            note = "" if error is None else f"±{error:.3f}"
            row.append(Cell(fixed(num(last, BITS)), note, value=num(last, BITS)))
            if c.changes is not None:
                change = c.changes.get(language)
                cell = change.cell() if change else Cell()
                row.append(cell if intervals else replace(cell, note=""))
        row += [averages.get(language, Cell())] if averages else []
        value = num(last, BITS)
        for key in baselines:
            base = num(last, "baselines", key)
            won = base is not None and value is not None and value < base
            text = "" if is_mean else fixed(base)
            row.append(Cell(text, value=base, verdict="better" if won else ""))
        if baselines:
            right, parity = num(last, "accuracy"), num(last, "parity")
            row.append(Cell(fixed(right, ".1%"), value=right))
            row.append(Cell("" if parity is None else fixed(parity), value=parity))
        return row

    rows = [row_of(i, k) for i, k in enumerate([*shown, MACRO, "micro"])]
    table = Table(heads, rows[: len(shown)], rows[len(shown) :])
    return table.without_empty_columns()


def language_text(
    evals: Sequence[Mapping[str, Any]], languages: Sequence[str] = ()
) -> str:
    """Plain-text bits per byte by language: a column per evaluation, and baselines.

    Of more than four evaluations, the first and the last three are shown.
    """
    shown = list(evals) if len(evals) <= 4 else [evals[0], *evals[-3:]]
    parts: list[str] = []
    for name in sets_of(shown):
        order = list(dict.fromkeys([*languages, *languages_of(shown, name)]))
        columns = [Column(label_of(e, 14), e) for e in shown]
        table = score_table(columns, name, order, ("unigram", "xz"))
        parts += [
            f"bits per byte on held-out set {plain(name)!r} (± standard error)",
            table.text(width=110),
            *(beaten(shown[-1], name, key) for key in ("unigram", "xz")),
            "",
        ]
    return "\n".join(parts).rstrip()


def run_text(folder: AnyPath) -> str:
    """The per-language table of a run: before, and after each stage."""
    run = read_run(folder)
    return language_text(run.stage_evals, run.languages) or "no evaluation in this run"


def score_chart(
    title: str,
    evals: Sequence[Evaluation],
    name: str,
    languages: Sequence[str],
    changes: Mapping[str, Change],
) -> Markup:
    """By language: bits per byte before and after the stages, with baselines; what the
    last stage changed; bits for the same content relative to English's, if it is there.

    Args:
      evals: of that set, in order.
    """
    tested = languages_of(evals, name)
    shown = [*(k for k in languages if k in tested), MACRO]
    bits, parity = {}, {}
    labels = [label_of(e) for e in evals]
    for language in shown:
        results = [score(e, name, language) for e in evals]
        bits[language] = course([num(r, BITS) for r in results], labels)
        parity[language] = course([num(r, "parity") for r in results], labels)[-2:]
        for key, look in (("unigram", "cross"), ("xz", "tick")):
            base = num(results[-1], "baselines", key)
            bits[language] += (
                [] if base is None else [Dot(base, look, name=BASELINES[key])]
            )
    stage = plain(get(evals[-1], "stage") or "the last", 16)
    panels = [Panel("bits per byte", bits, line=None, ticks=8)]
    if changes:
        dots = {k: [c.dot()] for k, c in changes.items()}
        panels.append(Panel(f"change in {stage}", dots))
    if any(parity.values()):
        panels.append(Panel("parity: bits per unit, English = 1", parity, line=1.0))
    widths = [2.2, *(1.0 for _ in panels[1:])]
    return dots_chart(title, panels, shown, languages, widths)


def course(values: Sequence[float | None], labels: Sequence[str]) -> list[Dot]:
    """Dots of one language's values: open before training, faint after a stage, large
    at the end; a line from the first to the last."""
    known = [v for v in values if v is not None]
    dots = []
    for i, value in enumerate(values):
        last = i == len(values) - 1
        look = "large" if last else "faint" if i else "open"
        way = (known[0], known[-1]) if i == 0 and not last and known else (None, None)
        if value is not None:
            dots.append(Dot(value, look, way[0], way[1], name=labels[i]))
    return dots
