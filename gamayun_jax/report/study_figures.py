"""Figures of a study's page: curricula, differences, outcomes, learning curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gamayun_jax.report.charts import (
    INK,
    Dot,
    Line,
    LinePanel,
    Panel,
    Points,
    dots_chart,
    lines_chart,
    percent,
)
from gamayun_jax.report.colours import arm_colours
from gamayun_jax.report.curves import areas_of, late_limits
from gamayun_jax.report.formats import plain, short
from gamayun_jax.report.html import block
from gamayun_jax.report.read_run import entries, num, rows
from gamayun_jax.study.findings import ArmRuns, Compared, Findings

if TYPE_CHECKING:
    from markupsafe import Markup

LETTERS = 28  # of an arm's name


def languages_of(f: Findings) -> list[str]:
    """All languages of the page."""
    known = (k for a in f.arms for k in a.plan["config"]["languages"])
    return list(dict.fromkeys([*known, *f.known_languages()]))


def dots_of(c: Compared, seeds: bool = True) -> list[Dot]:
    """A difference with its interval; faint and open: the single seeds."""
    e, each = c.difference.estimate, c.difference.by_seed.values()
    if not c.difference.n:
        return []
    whole = Dot(e.value, "solid", e.low, e.high, name="difference")
    if not seeds or len(each) < 2:
        return [whole]
    return [*(Dot(x, "open", name="one seed") for x in each), whole]


# --- curricula --------------------------------------------------------------------


def alike(f: Findings) -> dict[str, list[ArmRuns]]:
    """Arms that differ in size alone, by what they share: they are one picture."""
    groups: dict[str, list[ArmRuns]] = {}
    for arm in f.arms:
        rest = [v for k, v in arm.levels.items() if k != "size"]
        groups.setdefault("-".join(rest) or arm.name, []).append(arm)
    return groups


def scientific(x: float) -> str:
    """0.0005 -> "5e-4"."""
    return re.sub(r"e-0*", "e-", f"{x:.2g}" if not x else f"{x:.1e}".replace(".0", ""))


def curricula_grid(f: Findings, curricula: Mapping[str, Any]) -> Markup:
    """For each arm what it trains on and how fast, over tokens."""
    order, charts = languages_of(f), []
    for name, arms in alike(f).items():
        told = entries(curricula, arms[0].name)
        points = rows(told, "shares")
        if not points:
            continue
        known = [*order, *(s.split("/")[0] for s in entries(points[0], "shares"))]
        bounds = [num(s, "start_tokens") or 0.0 for s in rows(told, "stages")[1:]]
        rates = [(float(x), float(y)) for x, y in told.get("rates", ())]
        top = max((y for _, y in rates), default=0.0) or 1.0
        areas = areas_of(points, list(dict.fromkeys(known)))
        panels = [
            LinePanel(
                plain(name, LETTERS), areas, short, percent, limits=(0.0, 1.0),
                boundaries=bounds,
            ),
            LinePanel(
                "", [Line(rates, name="learning rate")], short, scientific,
                limits=(0.0, 1.08 * top), boundaries=bounds,
            ),
        ]  # fmt: skip
        title = f"Curriculum of {plain(name)}"
        charts.append(lines_chart(title, panels, 1, width=190.0, height=46.0))
    return block("grid", charts, True)


# --- differences ------------------------------------------------------------------


def forest(
    f: Findings,
    title: str,
    found: Iterable[Compared],
    names: Sequence[str],
    letters: int = LETTERS,
) -> Markup:
    """A row for each comparison, a panel for each outcome.

    Args:
      names: of the rows.
      letters: most characters of a name.
    """
    panels: dict[str, dict[str, list[Dot]]] = {}
    for c, name in zip(found, names, strict=True):
        panels.setdefault(c.outcome, {}).setdefault(name, []).extend(dots_of(c))
    drawn = [
        Panel(f"{f.unit(outcome)}, {plain(outcome, 20)}", dots)
        for outcome, dots in panels.items()
    ]
    shown = list(dict.fromkeys(names))
    return dots_chart(title, drawn, shown, (), letters=letters)


def language_charts(f: Findings) -> Iterable[tuple[str, Markup]]:
    """For each held-out set a panel per hypothesis, with a row for every language."""
    order = languages_of(f)
    for name in dict.fromkeys(c.set for c in f.languages):
        panels: dict[str, dict[str, list[Dot]]] = {}
        for c in f.languages:
            if c.set == name:
                panels.setdefault(c.name, {})[c.language] = dots_of(c, seeds=False)
        known = dict.fromkeys(k for dots in panels.values() for k in dots)
        shown = [
            *(k for k in order if k in known),
            *(k for k in known if k not in order),
        ]
        drawn = [Panel(plain(k, 24), dots, ticks=3) for k, dots in panels.items()]
        title = f"Differences by language on {plain(name)}"
        yield name, dots_chart(title, drawn, shown, order, shared=True)


def size_charts(f: Findings) -> Iterable[Markup]:
    """Registered pairs at every size: a panel per pair and outcome, a row per size."""
    sizes = list(dict.fromkeys(a.levels["size"] for a in f.arms))
    panels: dict[str, dict[str, list[Dot]]] = {}
    for c in f.sizes:
        title = f"{plain(c.outcome, 20)}: {plain(c.name, 32)}"
        panels.setdefault(title, {})[f.arm(c.arm).levels["size"]] = dots_of(c)
    drawn = [Panel(title, dots, ticks=3) for title, dots in panels.items()]
    for i in range(0, len(drawn), 2):  # titles are long
        yield dots_chart("Differences by size", drawn[i : i + 2], sizes, ())


def arms_chart(f: Findings) -> Markup:
    """Every run's outcomes by arm, and their means."""
    panels = []
    for outcome in f.outcomes[:4]:
        dots: dict[str, list[Dot]] = {}
        for arm in f.arms:
            values = list(arm.values(outcome).values())
            dots[arm.name] = [Dot(v, "open", name="one run") for v in values]
            if values:
                dots[arm.name].append(Dot(float(np.mean(values)), name="mean"))
        panels.append(Panel(plain(outcome.name, 24), dots, line=None, ticks=3))
    names = [a.name for a in f.arms]
    return dots_chart("Outcomes by arm", panels, names, (), letters=LETTERS)


# --- learning curves --------------------------------------------------------------


def curve_of(arm: ArmRuns, language: str = "") -> Points:
    """(tokens, nats per token), the mean over an arm's seeds; of one language, or ""
    for the mean over languages."""
    sums: dict[float, list[float]] = {}
    for record in arm.done.values():
        for row in rows(record, "curve"):
            tokens, by = num(row, "tokens"), entries(row, "languages")
            values = [v for k in by if (v := num(by, k)) is not None]
            value = num(by, language) if language else None
            if not language and values:
                value = sum(values) / len(values)
            if tokens is not None and value is not None:
                sums.setdefault(tokens, []).append(value)
    most = max(map(len, sums.values()), default=0)
    return [(x, sum(v) / len(v)) for x, v in sorted(sums.items()) if len(v) == most]


def curve_charts(f: Findings) -> tuple[dict[str, str], list[Markup]]:
    """Arm's levels but size -> its colour, and learning curves: the mean over languages
    for each size, and every language at the last one."""
    colours = arm_colours(alike(f))
    by_size: dict[str, dict[str, ArmRuns]] = {}
    for name, arms in alike(f).items():
        for arm in arms:
            by_size.setdefault(arm.levels.get("size", ""), {})[name] = arm

    def panel(title: str, arms: Mapping[str, ArmRuns], language: str) -> LinePanel:
        lines = [
            Line(curve_of(a, language), colours[k], name=k) for k, a in arms.items()
        ]
        limits = late_limits([line.points for line in lines])
        label = "" if language else "nats per token"
        return LinePanel(title, lines, short, None, "", label, INK, limits)

    charts = [
        lines_chart(
            "Learning curves",
            [panel(plain(size, 20), arms, "") for size, arms in by_size.items()],
            min(3, len(by_size)),
            height=130.0,
        )
    ]
    size, last = list(by_size.items())[-1]
    panels = [panel(plain(k, 20), last, k) for k in languages_of(f)]
    charts.append(lines_chart(f"Learning curves by language {size}", panels))
    return colours, charts
