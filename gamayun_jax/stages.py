"""What each stage changed: by language and test, gain, forgetting, or only noise.

The same items are scored before and after a stage, so their differences are what
counts: items are drawn again with replacement, in pairs (a paired bootstrap), which
gives the standard error and the 95 % interval of a change. A change is called one
beyond noise if it stays significant at 5 % by Holm's correction (1979) over all
languages of that test at that boundary. Where a run has no items, the standard errors
of both evaluations are combined as if the items differed, which is cautious.

Shape suffixes: N items, R draws.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.figures import axes, colours_of, horizontal, styled, to_svg
from gamayun_jax.page import html_table, section, td
from gamayun_jax.runs import (
    INK,
    Run,
    entries,
    esc,
    fixed,
    get,
    label_of,
    num,
    plain,
)

DRAWS = 2000
LEVEL = 0.05
VERDICTS = {"better": "gain", "worse": "forgetting", "same": "within noise"}
MACRO = "macro"


@dataclass(frozen=True)
class Change:
    """What a stage did to one test in one language (or in their mean, "macro")."""

    test: str
    metric: str
    language: str
    before: float
    after: float
    low: float  # of the 95 % interval of after - before
    high: float
    p: float
    verdict: str  # better | worse | same: after the correction
    paired: bool

    @property
    def delta(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Boundary:
    """A stage, between two evaluations."""

    stage: str
    before: str
    after: str
    changes: list[Change]


def draws(ids: Sequence[str], count: int = DRAWS) -> np.ndarray:
    """How often each item is drawn, float32 [R, N].

    The same ids give the same draws: parallel items are drawn together in all
    languages, which keeps what their errors have in common.
    """
    digest = hashlib.sha256("\n".join(ids).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    n = len(ids)
    return rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float32)


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses fall, the chance of any false one at most `level` (Holm)."""
    order = np.argsort(p_values, kind="stable")
    found = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        found[i] = True
    return found


def two_sided(delta: float, error: float) -> float:
    """p-value of a normal difference with that standard error."""
    if not error:
        return 1.0 if delta == 0 else 0.0
    return math.erfc(abs(delta) / error / math.sqrt(2))


def read_items(path: Path) -> dict[str, dict[str, Mapping[str, Any]]]:
    """language -> id -> item of an items file; {} if it is missing or damaged."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                item = json.loads(line)
                found.setdefault(str(item["language"]), {})[str(item["id"])] = item
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def values_of(
    items: Sequence[Mapping[str, Any]], metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Numerators and denominators whose ratio of sums is the metric; None: gaps."""
    if metric == "bits_per_byte":
        pairs = [(num(i, "bits"), num(i, "bytes")) for i in items]
    else:
        pairs = [(num(i, "correct", metric), 1.0) for i in items]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    above, below = np.array(pairs, np.float64).T
    return (above, below) if below.sum() > 0 else None


def paired(
    old: Mapping[str, Any], new: Mapping[str, Any], metric: str
) -> tuple[float, float, np.ndarray] | None:
    """(before, after, float64 [R] differences of the draws) on the common items."""
    ids = sorted(old.keys() & new.keys())
    if len(ids) < 2 or len(ids) < 0.9 * max(len(old), len(new)):
        return None  # not the same test any more
    a = values_of([old[i] for i in ids], metric)
    b = values_of([new[i] for i in ids], metric)
    if a is None or b is None:
        return None
    times_RN = draws(ids)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [(times_RN @ x) / (times_RN @ y) for x, y in (a, b)]
    delta_R = np.nan_to_num(found[1] - found[0])
    return float(a[0].sum() / a[1].sum()), float(b[0].sum() / b[1].sum()), delta_R


def tests_of(record: Any) -> dict[str, tuple[str, dict[str, Any], Any]]:
    """Items file -> (metric, {language: results}, macro) of an evaluation."""
    found: dict[str, tuple[str, dict[str, Any], Any]] = {}
    for name, part in entries(record, "sets").items():
        results = entries(part, "languages")
        found[f"heldout-{name}"] = ("bits_per_byte", results, get(part, MACRO))
    for name, part in entries(record, "tasks").items():
        metric = str(get(part, "metric"))
        found[name] = (metric, entries(part, "languages"), get(part, MACRO))
    return found


def compare_test(folder: Path, name: str, old: Any, new: Any) -> list[Change]:
    """The changes of one test between two evaluations of a run, macro last."""
    metric, results, mean = tests_of(new)[name]
    _, former, former_mean = tests_of(old)[name]
    items = [
        read_items(folder / "eval" / f"{get(e, 'step')}.items" / f"{name}.jsonl")
        for e in (old, new)
    ]
    found: list[tuple[str, float, float, float, float, float, bool]] = []
    drawn: list[tuple[float, float, np.ndarray]] = []
    languages = [k for k in results if k in former]
    for language in [*languages, MACRO]:
        a = num(former_mean if language == MACRO else former[language], metric)
        b = num(mean if language == MACRO else results[language], metric)
        pair = paired(items[0].get(language, {}), items[1].get(language, {}), metric)
        if language == MACRO and drawn and len(drawn) == len(languages):
            parts = list(zip(*drawn, strict=True))
            a, b = float(np.mean(parts[0])), float(np.mean(parts[1]))
            pair = (a, b, np.mean(parts[2], axis=0))
        elif pair:
            drawn.append(pair)
        if pair:
            a, b, delta_R = pair
            low, high = (float(x) for x in np.quantile(delta_R, (0.025, 0.975)))
            p = two_sided(b - a, float(delta_R.std(ddof=1)))
        elif a is not None and b is not None:
            sources = (former_mean, mean)
            if language != MACRO:
                sources = (former[language], results[language])
            errors = [num(r, f"{metric}_se") for r in sources]
            if None in errors:
                continue
            error = math.hypot(*(e for e in errors if e is not None))
            low, high = b - a - 1.96 * error, b - a + 1.96 * error
            p = two_sided(b - a, error)
        else:
            continue
        found.append((language, a, b, low, high, p, bool(pair)))
    sign = -1 if metric == "bits_per_byte" else 1
    kept = holm([row[5] for row in found])
    shown = name.removeprefix("heldout-")
    return [
        Change(
            shown, metric, language, a, b, low, high, p,
            ("better" if sign * (b - a) > 0 else "worse") if real else "same", same,
        )
        for (language, a, b, low, high, p, same), real in zip(found, kept, strict=True)
    ]  # fmt: skip


def boundaries(folder: Path, run: Run) -> list[Boundary]:
    """Each stage of a run that was evaluated before and after it."""
    found = []
    labelled = [e for e in run.evals if get(e, "label")]
    for old, new in itertools.pairwise(labelled):
        names = [k for k in tests_of(new) if k in tests_of(old)]
        changes = [c for k in names for c in compare_test(Path(folder), k, old, new)]
        if changes:
            stage = plain(get(new, "stage") or label_of(new), 24)
            found.append(Boundary(stage, label_of(old), label_of(new), changes))
    return found


def by_test(changes: Iterable[Change]) -> dict[tuple[str, str], dict[str, Change]]:
    """(test, metric) -> language -> change."""
    found: dict[tuple[str, str], dict[str, Change]] = {}
    for c in changes:
        found.setdefault((c.test, c.metric), {})[c.language] = c
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


def stage_table(folder: Path, run: Run) -> str:
    """The changes of all stages as text; + a gain, - forgetting, beyond noise."""
    lines: list[str] = []
    for boundary in boundaries(folder, run):
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
                cell = f"{fixed(c.delta, '+.3f')}{mark[c.verdict]}" if c else "–  "
                line += f"{cell:>16}"
            lines.append(line.rstrip())
        lines += [
            f"{plain(name, 14)}: {metric}, {tally(list(found.values()))}"
            for (name, metric), found in tests.items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


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
            alpha = 0.35 if c.verdict == "same" else 1.0
            ax.plot([c.low, c.high], [i, i], color=colour, alpha=alpha)
            ax.plot(c.delta, i, "o", color=colour, alpha=alpha, markersize=5)
        ax.set_yticks(range(len(shown)), [plain(k, 14) for k in shown])
        ax.set_ylim(len(shown) - 0.4, -0.6)
        short = "bits per byte" if metric == "bits_per_byte" else plain(metric, 8)
        ax.set_title(f"{plain(name, 16)}, {short}")
        horizontal(ax, 3)
    return figure


def change_table(boundary: Boundary, languages: Sequence[str]) -> str:
    """Languages by tests: after the stage, and the change with its interval."""
    tests = by_test(boundary.changes)
    heads = ["language"]
    for name, _ in tests:
        heads += [name, "change"]
    lines = []
    for i, language in enumerate(order_of(boundary.changes, languages)):
        cells = td(esc(language, 20), i)
        for found in tests.values():
            c = found.get(language)
            if c is None:
                cells += td("–") + td("–")
                continue
            text = (
                f"{fixed(c.delta, '+.3f')}<small> [{fixed(c.low, '+.3f')}, "
                f"{fixed(c.high, '+.3f')}]{'' if c.paired else ' unpaired'}</small>"
            )
            arrow = f"{fixed(c.before)} → {fixed(c.after)}"
            cells += td(arrow, c.after) + td(text, c.delta, c.verdict)
        lines.append(f"<tr>{cells}</tr>")
    mean = lines[-1:] if any(c.language == MACRO for c in boundary.changes) else []
    return html_table(heads, lines[: len(lines) - len(mean)], mean)


def stage_sections(
    folder: Path, run: Run, languages: Sequence[str], who: str = ""
) -> Iterable[str]:
    """A section of the report for each stage; none without two evaluations."""
    for boundary in boundaries(folder, run):
        counts = "; ".join(
            f"{esc(name)}: {tally(list(found.values()))}"
            for (name, _), found in by_test(boundary.changes).items()
        )
        text = (
            f"From “{esc(boundary.before)}” to “{esc(boundary.after)}”, on the same "
            "items: before → after, the change, and its 95 % interval by a paired "
            "bootstrap. Green: a gain, red: forgetting, beyond noise at 5 % after "
            "Holm's correction over the languages of a test; grey and faint: within "
            f"noise. Bits per byte are better when lower. {counts}."
        )
        title = f"{who}What stage “{boundary.stage}” changed"
        svg = to_svg(change_figure(boundary, languages), title)
        yield section(title, text, change_table(boundary, languages), svg)
