"""What changes over tokens or time: losses, evaluations, rates; and what was served."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.report.charts import (
    DASHES,
    INK,
    Dot,
    Line,
    LinePanel,
    Panel,
    Points,
    dots_chart,
    lines_chart,
)
from gamayun_jax.report.colours import colours_of
from gamayun_jax.report.formats import plain, short
from gamayun_jax.report.read_run import Run, get, num, rows, seconds_of

if TYPE_CHECKING:
    from markupsafe import Markup


def loss_points(run: Run, language: str, limit: int = 240) -> tuple[Points, Points]:
    """(tokens, nll) in about `limit` points, as they are and smoothed.

    Means are over target tokens and never reach across a stage boundary.
    """

    def mean(part: Sequence[tuple[float, float, float]]) -> float:
        return sum(y * w for _, y, w in part) / sum(w for *_, w in part)

    raw: Points = []
    smooth: Points = []
    size = -(-len(run.metrics) // limit)
    for _, group in itertools.groupby(run.metrics, key=lambda m: str(get(m, "stage"))):
        weighted = []
        for m in group:
            x, y = num(m, "tokens"), num(m, "languages", language, "nll")
            weight = num(m, "languages", language, "targets") or 1.0
            if x is not None and y is not None:
                weighted.append((x, y, max(1.0, weight)))
        width = max(1, len(run.metrics) // 40)
        for i in range(0, len(weighted), size):
            reach = min(width, i, len(weighted) - 1 - i)
            raw.append((weighted[i][0], mean(weighted[i : i + size])))
            smooth.append((weighted[i][0], mean(weighted[i - reach : i + reach + 1])))
    return raw, smooth


def late_limits(lines: Sequence[Points]) -> tuple[float, float] | None:
    """Ends of y that fit what follows the steep start: the first point, or twentieth
    part."""
    late = [y for line in lines for _, y in line[max(len(line) > 2, len(line) // 20) :]]
    if not late or min(late) == max(late):
        return None
    pad = 0.06 * (max(late) - min(late))
    return min(late) - pad, max(late) + pad


def boundaries_of(run: Run) -> list[float]:
    """Where stages begin, but the first."""
    return [begin for _, begin, _ in run.stages[1:]]


def loss_chart(title: str, run: Run, languages: Sequence[str]) -> Markup:
    """Training loss by language: smoothed, and faintly as it was."""
    raw, smooth, ends = [], [], []
    for language, colour in colours_of(languages).items():
        points, means = loss_points(run, language)
        if means:
            raw.append(Line(points, colour, faint=True))
            smooth.append(Line(means, colour))
            ends.append((means[-1][1], language, colour))
    panel = LinePanel(
        "", [*raw, *smooth], xform=short, xlabel="tokens", ylabel="nats per token",
        limits=late_limits([line.points for line in smooth]),
        boundaries=boundaries_of(run), ends=ends,
        names=[((begin + end) / 2, name) for name, begin, end in run.stages],
    )  # fmt: skip
    return lines_chart(title, [panel], height=300.0)


def panels_chart(
    title: str,
    runs: Sequence[Run],
    keys: Sequence[str],
    languages: Sequence[str],
    points_of: Callable[[Run, str], Points],
    ylabel: str = "",
    cut: bool = True,
) -> Markup:
    """A small panel per key (a language, or a mean), a line style per run.

    Args:
      cut: leave out the steep start.
    """
    colours, panels = colours_of(languages), []
    for key in keys:
        colour, points = colours.get(key, INK), [points_of(run, key) for run in runs]
        lines = [
            Line(line, colour, dash)
            for line, dash in zip(points, itertools.cycle(DASHES), strict=False)
        ]
        panels.append(
            LinePanel(
                plain(key, 20), lines, xform=short, ylabel=ylabel, colour=colour,
                limits=late_limits(points) if cut else None,
                boundaries=boundaries_of(runs[0]),
            )
        )  # fmt: skip
    return lines_chart(title, panels)


def sources_chart(title: str, run: Run, languages: Sequence[str]) -> Markup:
    """Tokens and epochs of each source by stage, and a tick for what was served."""
    planned: dict[tuple[str, str, str], float | None] = {}
    for r in rows(run.lineage, "curriculum", "table"):
        for key in ("tokens", "epochs"):
            where = (key, str(get(r, "source")), str(get(r, "phase")))
            planned[where] = num(r, key)
    stages = list(dict.fromkeys(stage for _, _, stage in planned))
    names = list(dict.fromkeys(source for _, source, _ in planned))
    order = [*languages, *(s.split("/")[0] for s in names)]
    names.sort(key=lambda s: order.index(s.split("/")[0]))
    last: Any = run.metrics[-1] if run.metrics else {}
    panels = []
    for key in ("tokens", "epochs"):
        dots: dict[str, list[Dot]] = {}
        for name in names:
            parts = [planned.get((key, name, stage)) for stage in stages]
            begin, bars = 0.0, []
            looks = itertools.cycle(("bar", "bar-light"))
            for part, look in zip(parts, looks, strict=False):
                end = begin + max(0.0, part or 0.0)
                bars.append(Dot(end, look, begin, end))
                begin = end
            text = short(begin) if key == "tokens" else f"{begin:.2f}"
            known = any(part is not None for part in parts)
            served = num(last, "sources", name, "tokens") if key == "tokens" else None
            if served is not None:
                bars.append(Dot(served, "tick"))
            label = Dot(max(begin, served or 0.0), "bar", text=text if known else "–")
            dots[name] = [*bars, label]
        panels.append(Panel(key, dots, form=short, ticks=5))
    return dots_chart(title, panels, names, [*dict.fromkeys(order)])


def course_chart(runs: Sequence[Run], name: str, over: str, *keys: str) -> Markup:
    """One number over tokens or over time, a line style per run."""
    total = max(seconds_of(run) for run in runs)
    unit, seconds_per_unit = ("hours", 3600.0) if total > 7200 else ("minutes", 60.0)
    lines = []
    for run, dash in zip(runs, itertools.cycle(DASHES), strict=False):
        points, clock = [], 0.0
        for m in run.metrics:
            seconds, y = num(m, "time", "seconds") or 0.0, num(m, *keys)
            clock += seconds / seconds_per_unit
            x = num(m, "tokens") if over == "tokens" else clock
            if keys[-1] == "data_wait_s":
                y = num(m, "time", "input_s") if y is None else y
                y = 100 * y / seconds if y is not None and seconds else None
            if x is not None and y is not None:
                points.append((x, y))
        lines.append(Line(points[:: -(-len(points) // 500) or 1], dash=dash))
    most = max((y for line in lines for _, y in line.points), default=0.0)
    panel = LinePanel(
        name, lines, xform=short if over == "tokens" else None, yform=short,
        xlabel=over if over == "tokens" else unit, limits=(0.0, max(1.05 * most, 1e-9)),
        boundaries=boundaries_of(runs[0]) if over == "tokens" else (),
    )  # fmt: skip
    return lines_chart(name, [panel], width=338.0, height=100.0)
