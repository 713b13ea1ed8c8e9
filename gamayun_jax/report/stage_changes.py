"""What each stage changed: by language and test, gain, forgetting, or only noise.

The same items are scored before and after a stage, so their differences are what
counts (paired.py, also for what is marked: Holm's correction is over all languages and
tests of a boundary). Where a run has no items, the standard errors of both evaluations
are combined as if the items differed, which is cautious.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gamayun_jax.data.files import json_lines
from gamayun_jax.evaluate.paired import (
    MACRO,
    RULE,
    Cell,
    cells,
    unpaired,
    verdicts,
)
from gamayun_jax.report.figures import (
    axes,
    change_line,
    colours_of,
    horizontal,
    styled,
    to_svg,
)
from gamayun_jax.report.html import html_table, section, td
from gamayun_jax.report.read_run import (
    INK,
    Run,
    entries,
    esc,
    fixed,
    get,
    label_of,
    num,
    plain,
    score,
)

VERDICTS = {"better": "gain", "worse": "forgetting", "same": "within noise"}


@dataclass(frozen=True)
class Change:
    """What a stage did to one test in one language (or in their mean, "macro")."""

    test: str  # as its items' file is called
    metric: str
    language: str
    before: float | None
    after: float | None
    cell: Cell
    verdict: str  # better | worse | same: after the correction
    paired: bool

    @property
    def name(self) -> str:
        """What people call the test; a task may be called as a held-out set is."""
        also = self.metric == "bits_per_byte" and not self.test.startswith("heldout-")
        return f"{self.test} (task)" if also else self.test.removeprefix("heldout-")


@dataclass(frozen=True)
class Boundary:
    """A stage, between two evaluations."""

    stage: str
    before: str
    after: str
    changes: list[Change]
    damaged: list[str]  # lines of its items that were left out, by their files


def read_items(path: Path) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """(language -> id -> item, numbers of the damaged lines) of an items file; nothing
    if it is missing."""
    found: dict[str, dict[str, Any]] = {}
    damaged: list[int] = []
    data = path.read_bytes() if path.is_file() else b""
    for number, (_, item) in enumerate(json_lines(data), 1):
        if item is not None and "language" in item and "id" in item:
            found.setdefault(str(item["language"]), {})[str(item["id"])] = item
        else:
            damaged.append(number)
    return found, damaged


def item_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], metric: str
) -> dict[str, tuple[float, float]]:
    """Id -> (new - old, weight) of the rows that both have, of one language.

    Bits weigh by the item's bytes, and only where both scored as many. Rows without
    the metric are left out.
    """
    found = {}
    for i in sorted(old.keys() & new.keys()):
        if metric == "bits_per_byte":
            a, b = num(old[i], "bits"), num(new[i], "bits")
            weight = num(old[i], "bytes")
            if weight != num(new[i], "bytes"):
                continue
        else:
            a, b = (num(x, "correct", metric) for x in (old[i], new[i]))
            weight = 1.0
        if a is not None and b is not None and weight is not None:
            found[i] = b - a, weight
    return found


def interval_text(cell: Cell, scale: float = 1.0, digits: int = 3) -> str:
    """ "−0.010 … +0.004": with as many digits as show on which side of 0 it is."""
    if cell.low is None or cell.high is None:
        return "–"
    near = min(abs(cell.low), abs(cell.high)) * scale
    if cell.low * cell.high > 0:
        while digits < 9 and round(near, digits) == 0:
            digits += 1
    low, high = (fixed(scale * x, f"+.{digits}f") for x in (cell.low, cell.high))
    return f"{low} … {high}"


def tests_of(record: Any) -> dict[str, tuple[str, dict[str, Any], Any, bool]]:
    """Items file -> (metric, {language: results}, macro, parallel) of an evaluation."""
    found: dict[str, tuple[str, dict[str, Any], Any, bool]] = {}
    for kind in ("sets", "tasks"):
        for name, part in entries(record, kind).items():
            metric = str(get(part, "metric"))
            if kind == "sets":
                name, metric = f"heldout-{name}", "bits_per_byte"
            same = bool(get(part, "parallel"))
            found[name] = metric, entries(part, "languages"), get(part, MACRO), same
    return found


def items_of(run: Run, record: Any) -> Path:
    """The folder of an evaluation's items; missing if they were not written."""
    return run.folder / "eval" / f"{get(record, 'step')}.items"


def changes_between(
    old: Any, new: Any, old_items: Path | None = None, new_items: Path | None = None
) -> list[Change]:
    """All that both evaluations have, macro last in each test.

    Args:
      old_items, new_items: folders of their items, if there are any.
    """
    found: list[Change] = []
    for name, (metric, results, mean, parallel) in tests_of(new).items():
        if name not in tests_of(old):
            continue
        _, former, former_mean, _ = tests_of(old)[name]
        a, b = (
            read_items(f / f"{name}.jsonl")[0] if f else {}
            for f in (old_items, new_items)
        )
        languages = [k for k in results if k in former]
        pairs = {
            k: pair
            for k in languages
            if k in a and k in b
            if (pair := item_differences(a[k], b[k], metric))
            if len(pair) >= 0.9 * max(len(a[k]), len(b[k]))  # else another test by now
        }
        paired = cells(pairs, parallel)
        if len(pairs) < len(languages):
            paired.pop(MACRO, None)
        means = [MACRO] if former.keys() == results.keys() or MACRO in paired else []
        for language in [*languages, *means]:
            rows = (former_mean, mean)
            if language != MACRO:
                rows = (former[language], results[language])
            before, after = (num(r, metric) for r in rows)
            cell = paired.get(language)
            if not cell and before is not None and after is not None:
                errors = [num(r, f"{metric}_se") for r in rows]
                cell = unpaired(after - before, *errors)
            if cell:
                found.append(
                    Change(
                        name, metric, language, before, after, cell, verdict="",
                        paired=language in paired,
                    )
                )  # fmt: skip
    signs = [-1 if c.metric == "bits_per_byte" else 1 for c in found]
    marks = verdicts([c.cell for c in found], signs)
    return [replace(c, verdict=v) for c, v in zip(found, marks, strict=True)]


def boundaries(run: Run) -> list[Boundary]:
    """Each stage of a run that was evaluated before and after it."""
    found = []
    labelled = [e for e in run.evals if get(e, "label")]
    for old, new in itertools.pairwise(labelled):
        changes = changes_between(old, new, items_of(run, old), items_of(run, new))
        if changes:
            stage = plain(get(new, "stage") or label_of(new), 24)
            labels = label_of(old), label_of(new)
            found.append(
                Boundary(stage, *labels, changes, damaged_items(run, old, new))
            )
    return found


def damaged_items(run: Run, *records: Any) -> list[str]:
    """ "eval/13.items/quiz.jsonl, line 5" of the evaluations' damaged lines."""
    return [
        f"{path.relative_to(run.folder)}, line {number}"
        for record in records
        for path in sorted(items_of(run, record).glob("*.jsonl"))
        for number in read_items(path)[1]
    ]


def set_changes(
    name: str, old: Any, new: Any, *items: Path | None
) -> dict[str, Change]:
    """Language -> change of a held-out set (see `changes_between`); of the mean over
    all units, "micro", only the number, for it is no further test."""
    test = f"heldout-{name}"
    changes = changes_between(old, new, *items)
    found = {c.language: c for c in changes if c.test == test}
    a, b = (num(score(e, name, "micro"), "bits_per_byte") for e in (old, new))
    if a is not None and b is not None:
        cell = Cell(b - a, None, None, 1.0)
        found["micro"] = Change(test, "bits_per_byte", "micro", a, b, cell, "", False)
    return found


def by_test(changes: Iterable[Change]) -> dict[tuple[str, str], dict[str, Change]]:
    """(test, metric) -> language -> change."""
    found: dict[tuple[str, str], dict[str, Change]] = {}
    for c in changes:
        found.setdefault((c.name, c.metric), {})[c.language] = c
    return found


def order_of(changes: Iterable[Change], languages: Sequence[str]) -> list[str]:
    """Languages in the order of the run, macro last."""
    there = dict.fromkeys(c.language for c in changes)
    known = [k for k in languages if k in there]
    rest = [k for k in there if k not in known and k != MACRO]
    return [*known, *rest, *([MACRO] if MACRO in there else [])]


def tally(changes: Sequence[Change]) -> str:
    """ "3 gain, 1 forgetting, 8 within noise" of the languages."""
    found = [c.verdict for c in changes if c.language != MACRO]
    return ", ".join(f"{found.count(k)} {word}" for k, word in VERDICTS.items())


def stage_table(run: Run) -> str:
    """The changes of all stages as text; + a gain, - forgetting, beyond noise."""
    lines: list[str] = []
    for boundary in boundaries(run):
        tests = by_test(boundary.changes)
        lines += [
            f"change in stage {boundary.stage} (from {boundary.before} to "
            f"{boundary.after}); + gain, - forgetting, beyond noise",
            f"{'':<7}" + "".join(f"{plain(name, 14):>16}" for name, _ in tests),
        ]
        for language in order_of(boundary.changes, run.languages):
            line = f"{plain(language, 6):<7}"
            for found in tests.values():
                c = found.get(language)
                mark = {"better": " +", "worse": " -", "same": "  "}
                text = "–  "
                if c:
                    text = f"{fixed(c.cell.difference, '+.3f')}{mark[c.verdict]}"
                line += f"{text:>16}"
            lines.append(line.rstrip())
        lines += [
            f"{plain(name, 14)}: {metric}, {tally(list(found.values()))}"
            for (name, metric), found in tests.items()
        ]
        lines += [damage_text(boundary)] if boundary.damaged else []
        lines.append("")
    return "\n".join(lines).rstrip()


def damage_text(boundary: Boundary) -> str:
    """What of a boundary's items was left out, in a sentence."""
    first = "; ".join(boundary.damaged[:5])
    return f"damaged lines of items left out: {len(boundary.damaged)} ({first})."


@styled
def change_figure(boundary: Boundary, languages: Sequence[str]) -> Any:
    """A panel per test: each language's change with its 95 % interval."""
    tests = by_test(boundary.changes)
    shown = order_of(boundary.changes, languages)
    across = min(len(tests), 4)
    down = -(-len(tests) // across)
    height = (0.22 * len(shown) + 0.8) * down
    figure, grid = axes(9.5, height, down, across, sharey=True)
    for ax in grid[len(tests) :]:
        ax.set_visible(False)
    for ax, ((name, metric), found) in zip(grid, tests.items(), strict=False):
        ax.axvline(0, color=INK, alpha=0.6, linewidth=0.8)
        for i, language in enumerate(shown):
            c = found.get(language)
            if c is None:
                continue
            colour = colours_of(languages).get(language, INK)
            change_line(ax, i, c, colour)
        ax.set_yticks(range(len(shown)), [plain(k, 14) for k in shown])
        ax.set_ylim(len(shown) - 0.4, -0.6)
        short = "bits per byte" if metric == "bits_per_byte" else plain(metric, 8)
        ax.set_title(f"{plain(name, 16)}, {short}")
        horizontal(ax, 3)
    return figure


def change_td(change: Change) -> str:
    """A cell of HTML: the change, its interval, the verdict's colour."""
    cell, text = change.cell, fixed(change.cell.difference, "+.3f")
    if cell.low is not None:
        text += f"<small> {interval_text(cell)}"
        text += f"{'' if change.paired else ' unpaired'}</small>"
    return td(text, cell.difference, change.verdict)


def change_table(boundary: Boundary, languages: Sequence[str]) -> str:
    """Languages by tests: after the stage, and the change with its interval."""
    tests = by_test(boundary.changes)
    heads = ["language"]
    for name, _ in tests:
        heads += [name, "change"]
    lines = []
    for i, language in enumerate(order_of(boundary.changes, languages)):
        row = td(esc(language, 20), i)
        for found in tests.values():
            c = found.get(language)
            if c is None:
                row += td("–") + td("–")
                continue
            arrow = f"{fixed(c.before)} → {fixed(c.after)}"
            row += td(arrow, c.after) + change_td(c)
        lines.append(f"<tr>{row}</tr>")
    mean = lines[-1:] if any(c.language == MACRO for c in boundary.changes) else []
    return html_table(heads, lines[: len(lines) - len(mean)], mean)


def stage_sections(run: Run, languages: Sequence[str], who: str = "") -> Iterable[str]:
    """A section of the report for each stage; none without two evaluations."""
    for boundary in boundaries(run):
        counts = "; ".join(
            f"{esc(name)}: {tally(list(found.values()))}"
            for (name, _), found in by_test(boundary.changes).items()
        )
        text = (
            f"From “{esc(boundary.before)}” to “{esc(boundary.after)}”: before → after "
            f"and the change. {RULE} Green: a gain, red: forgetting. Bits per byte are "
            f"better when lower. {counts}."
        )
        if boundary.damaged:
            text += f' <b class="gap">{esc(damage_text(boundary), 400)}</b>'
        title = f"{who}What stage “{boundary.stage}” changed"
        svg = to_svg(change_figure(boundary, languages), title)
        yield section(title, text, change_table(boundary, languages), svg)
