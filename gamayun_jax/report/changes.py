"""What two evaluations differ by, by language and test: better, worse, or only noise.

The one rule of stages, of runs, of quantised weights and of `gamayun compare`. The same
items are scored twice, so their differences are what counts (evaluate/paired.py);
Holm's correction is over all languages and tests of the two evaluations. Where items
are missing, the standard errors of both are combined as if the items differed, which is
cautious.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gamayun_jax.evaluate.paired import (
    MACRO,
    Estimate,
    estimates,
    unpaired,
    verdicts,
)
from gamayun_jax.report.charts import Dot, Panel, dots_chart, percent
from gamayun_jax.report.colours import language_cell
from gamayun_jax.report.formats import fixed, interval_text, metric_name, plain
from gamayun_jax.report.html import block, section
from gamayun_jax.report.read_run import Evaluation, Run, entries, get, label_of, num
from gamayun_jax.tables import Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup

VERDICTS = {"better": "gain", "worse": "forgetting", "same": "within noise"}
BITS = "bits_per_byte"  # the one metric that is better when lower


@dataclass(frozen=True)
class Test:
    """A held-out set or a task in an evaluation's record."""

    file: str  # as its items' file is called
    metric: str
    parallel: bool
    languages: Mapping[str, Any]
    macro: Any


@dataclass(frozen=True)
class Change:
    """What one test differs by in one language, or in their mean (MACRO)."""

    test: str  # as its items' file is called
    metric: str
    language: str
    before: float | None
    after: float | None
    estimate: Estimate
    verdict: str  # better | worse | same: after the correction
    paired: bool

    @property
    def name(self) -> str:
        """What people call the test; a task may be called as a held-out set is."""
        also = self.metric == BITS and not self.test.startswith("heldout-")
        return f"{self.test} (task)" if also else self.test.removeprefix("heldout-")

    @property
    def sign(self) -> int:
        """1 if more is better, -1 if less is."""
        return -1 if self.metric == BITS else 1

    @property
    def unit(self) -> tuple[float, int]:
        """What a value is multiplied by, and its digits: shares are told in percent."""
        return (1.0, 3) if self.metric == BITS else (100.0, 1)

    def cell(self) -> Cell:
        """The change with its interval, coloured by the verdict: with as many digits as
        show on which side of 0 it is, where that is certain."""
        e, note = self.estimate, ""
        scale, digits = self.unit
        if e.low is not None:
            kind = "" if self.paired else " unpaired"
            note = interval_text(e, scale, digits) + kind
        value = scale * e.value
        while self.verdict in ("better", "worse") and not round(value, digits):
            digits += 1
            if digits > 9:
                break
        text = fixed(value, f"+.{digits}f")
        return Cell(text, note, value=e.value, verdict=self.verdict)

    def arrow(self) -> str:
        """ "2.426 → 2.319", before and after."""
        scale, digits = self.unit
        ends = (None if v is None else scale * v for v in (self.before, self.after))
        return " → ".join(fixed(v, f".{digits}f") for v in ends)

    def dot(self) -> Dot:
        """The change with its interval in a figure, faint within noise."""
        look = "faint" if self.verdict == "same" else "solid"
        e, name = self.estimate, f"change ({VERDICTS.get(self.verdict, 'mean')})"
        return Dot(e.value, look, e.low, e.high, name=name)


def tests_of(record: Mapping[str, Any]) -> dict[str, Test]:
    """The tests of an evaluation, by their items' files."""
    tests: dict[str, Test] = {}
    for kind in ("sets", "tasks"):
        for name, part in entries(record, kind).items():
            metric = str(get(part, "metric"))
            if kind == "sets":
                name, metric = f"heldout-{name}", BITS
            same = bool(get(part, "parallel"))
            languages, macro = entries(part, "languages"), get(part, MACRO)
            tests[name] = Test(name, metric, same, languages, macro)
    return tests


def item_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], metric: str
) -> dict[str, tuple[float, float]]:
    """Id -> (new - old, weight) of the items that both have, of one language.

    Bits weigh by the item's bytes, and only where both scored as many. Items without
    the metric are left out.
    """
    differences = {}
    for i in sorted(old.keys() & new.keys()):
        if metric == BITS:
            a, b = num(old[i], "bits"), num(new[i], "bits")
            weight = num(old[i], "bytes")
            if weight != num(new[i], "bytes"):
                continue
        else:
            a, b = (num(x, "correct", metric) for x in (old[i], new[i]))
            weight = 1.0
        if a is not None and b is not None and weight is not None:
            differences[i] = b - a, weight
    return differences


def test_changes(
    old: Evaluation, new: Evaluation, name: str, least_shared: float
) -> Iterable[Change]:
    """The changes of one test, without verdicts; see `changes_between`."""
    before, test = tests_of(old)[name], tests_of(new)[name]
    old_items, new_items = old.items_of(name)[0], new.items_of(name)[0]
    languages = [k for k in test.languages if k in before.languages]
    pairs = {}
    for k in languages:
        a, b = old_items.get(k, {}), new_items.get(k, {})
        pair = item_differences(a, b, test.metric)
        if pair and len(pair) >= least_shared * max(len(a), len(b)):
            pairs[k] = pair
    known = estimates(pairs, test.parallel)
    if len(pairs) < len(languages):
        known.pop(MACRO, None)
    # Means over other languages do not compare.
    means = [MACRO] if before.languages.keys() == test.languages.keys() else []
    for k in [*languages, *means]:
        rows = (before.macro, test.macro)
        if k != MACRO:
            rows = before.languages[k], test.languages[k]
        old_value, value = (num(r, test.metric) for r in rows)
        estimate = known.get(k)
        if not estimate and old_value is not None and value is not None:
            errors = [num(r, f"{test.metric}_se") for r in rows]
            estimate = unpaired(value - old_value, *errors)
        if estimate:
            paired = k in known
            yield Change(name, test.metric, k, old_value, value, estimate, "", paired)


@functools.lru_cache(maxsize=64)
def changes_between(
    old: Evaluation, new: Evaluation, least_shared: float = 0.9
) -> list[Change]:
    """All that both evaluations have, macro last in each test.

    Args:
      least_shared: share of a language's items that both must have; with fewer, the
        items were changed, and only the results compare.
    """
    both = [name for name in tests_of(new) if name in tests_of(old)]
    changes = [c for name in both for c in test_changes(old, new, name, least_shared)]
    marks = verdicts([c.estimate for c in changes], [c.sign for c in changes])
    return [replace(c, verdict=v) for c, v in zip(changes, marks, strict=True)]


@dataclass(frozen=True)
class Boundary:
    """A stage, between two evaluations."""

    stage: str
    before: str
    after: str
    changes: list[Change]
    damaged: list[str]  # lines of its items that were left out, by their files


def boundaries(run: Run) -> list[Boundary]:
    """Each stage of a run that was evaluated before and after it."""
    return [
        Boundary(
            plain(get(new, "stage") or label_of(new), 24), label_of(old), label_of(new),
            changes, damaged_items(run, old, new),
        )
        for old, new in itertools.pairwise(run.labelled)
        if (changes := changes_between(old, new))
    ]  # fmt: skip


def damaged_items(run: Run, *evals: Evaluation) -> list[str]:
    """ "eval/13.items/quiz.jsonl, line 5" of the evaluations' damaged lines."""
    return [
        f"{path.relative_to(run.folder)}, line {number}"
        for e in evals
        if e.folder
        for path in sorted(e.folder.glob("*.jsonl"))
        for number in e.items_of(path.stem)[1]
    ]


def by_test(changes: Iterable[Change]) -> dict[tuple[str, str], dict[str, Change]]:
    """(test, metric) -> language -> change."""
    tests: dict[tuple[str, str], dict[str, Change]] = {}
    for c in changes:
        tests.setdefault((c.name, c.metric), {})[c.language] = c
    return tests


def order_of(changes: Iterable[Change], languages: Sequence[str]) -> list[str]:
    """Languages in the order of the run, macro last."""
    there = dict.fromkeys(c.language for c in changes)
    known = [k for k in languages if k in there]
    rest = [k for k in there if k not in known and k != MACRO]
    return [*known, *rest, *([MACRO] if MACRO in there else [])]


def tallies(changes: Iterable[Change]) -> list[str]:
    """ "udhr: 3 gain, 1 forgetting, 8 within noise" of the languages, by test."""
    lines = []
    for (name, metric), of_test in by_test(changes).items():
        marks = [c.verdict for k, c in of_test.items() if k != MACRO]
        counts = ", ".join(f"{marks.count(k)} {word}" for k, word in VERDICTS.items())
        unit = (
            "bits per byte, lower is better" if metric == BITS else metric_name(metric)
        )
        lines.append(f"{plain(name, 20)} ({unit}): {counts}")
    return lines


def change_table(
    boundary: Boundary, languages: Sequence[str], narrow: bool = False
) -> Table:
    """Languages by tests: before and after the stage, and the change.

    Args:
      narrow: what was before and after stands below the change, on pages.
    """
    tests = by_test(boundary.changes)
    heads = ["language"]
    for name, metric in tests:
        heads.append(plain(name, 20) + ("" if metric == BITS else ", %"))
        heads += [] if narrow else ["change"]
    rows = []
    order = order_of(boundary.changes, languages)
    for i, language in enumerate(order):
        row = [language_cell(i, language, language == MACRO)]
        for of_test in tests.values():
            c = of_test.get(language)
            if narrow:
                row.append(replace(c.cell(), below=c.arrow()) if c else Cell())
            else:
                row += [Cell(c.arrow(), value=c.after), c.cell()] if c else [Cell()] * 2
        rows.append(row)
    means = order.count(MACRO)
    return Table(heads, rows[: len(rows) - means], rows[len(rows) - means :])


def stage_text(run: Run) -> str:
    """The changes of all stages as text; + a gain, - forgetting, beyond noise."""
    parts: list[str] = []
    for boundary in boundaries(run):
        table = change_table(boundary, run.languages)
        parts += [
            f"change in stage {boundary.stage} (from {boundary.before} to "
            f"{boundary.after}); + gain, - forgetting, beyond noise",
            table.text(notes=False, marks=True),
            *tallies(boundary.changes),
            *damage_texts(boundary),
            "",
        ]
    return "\n".join(parts).rstrip()


def damage_texts(boundary: Boundary) -> list[str]:
    """What of a boundary's items was left out, in a sentence; none if nothing was."""
    if not boundary.damaged:
        return []
    first = "; ".join(boundary.damaged[:5])
    return [f"damaged lines of items left out: {len(boundary.damaged)} ({first})."]


def stage_sections(run: Run, languages: Sequence[str], who: str) -> Iterable[Markup]:
    """A section of the report for each stage; none without two evaluations."""
    for boundary in boundaries(run):
        shown = order_of(boundary.changes, languages)
        many = len(by_test(boundary.changes)) > 3
        panels = [
            Panel(
                f"{plain(name, 20)}, {metric_name(metric)}",
                {k: [c.dot()] for k, c in of_test.items()},
                form=None if metric == BITS else percent,
            )
            for (name, metric), of_test in by_test(boundary.changes).items()
        ]
        title = f"{who}Before and after stage “{boundary.stage}”"
        yield section(
            title,
            f"From “{boundary.before}” to “{boundary.after}”, and the change with its "
            "95 % interval. Green ✓: a gain; red ✗: forgetting; grey ≈, and faint in "
            "the figure: within noise, over all languages and tests together, so also "
            "where an interval alone leaves out 0.",
            *(block("gap", text) for text in damage_texts(boundary)),
            block("table", change_table(boundary, languages, many), "pairs"),
            dots_chart(title, panels, shown, languages),
            block("notes", tallies(boundary.changes)),
        )
