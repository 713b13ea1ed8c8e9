"""What changes over tokens or time, drawn: losses, evaluations, mixtures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gamayun_jax.report.figures import (
    INK,
    PAPER,
    WIDTH,
    axes,
    colours_of,
    horizontal,
    label_ends,
    label_width,
    name_rows,
    styled,
)
from gamayun_jax.report.formats import plain, short
from gamayun_jax.report.read_run import (
    Points,
    Run,
    Span,
    entries,
    get,
    num,
    rows,
    seconds_of,
    spans,
)

DASHES = ("-", "--", ":", "-.")  # of runs


def token_axis(ax: Any, stages: Sequence[Span], names: bool = True) -> None:
    """Tokens along x; stage boundaries dashed, stage names above."""
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.locator_params(axis="x", nbins=6)
    low, high = ax.get_xlim()
    for i, (name, begin, end) in enumerate(stages):
        if i and low < begin < high:
            ax.axvline(begin, color=INK, alpha=0.55, lw=0.8, linestyle=(0, (4, 3)))
        middle = (max(begin, low) + min(end, high)) / 2
        if names and low < middle < high:
            where = ax.get_xaxis_transform()
            ax.text(middle, 1.015, name, transform=where, ha="center", alpha=0.75)


@styled
def curriculum_figure(
    points: Sequence[Mapping[str, Any]],
    languages: Sequence[str] = (),
    stages: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Shares of sources over tokens, stacked; domains of a language are shades of it.

    Args:
      points: {"tokens", "shares": {source: share}}, joined by straight lines.
      languages: their order; the colours follow it.
      stages: {"name", "start_tokens", "end_tokens"}.
    """
    points = [p for p in points if num(p, "tokens") is not None]
    sources = list(dict.fromkeys(s for p in points for s in entries(p, "shares")))
    order = list(dict.fromkeys([*languages, *(s.split("/")[0] for s in sources)]))
    sources.sort(key=lambda s: order.index(s.split("/")[0]))
    height = max(4.0, 0.18 * len(sources) + 1.2)
    margins = (0.7, label_width(sources) + 0.15, 0.3, 0.45)
    figure, (ax,) = axes(WIDTH, height, margins=margins)
    x = [num(p, "tokens") or 0.0 for p in points]
    total, ends, former, alpha = [0.0] * len(x), [], "", 1.0
    for s in sources:
        language, below = s.split("/")[0], total
        alpha = 0.95 if language != former else alpha * 0.62
        shares = [num(p, "shares", s) or 0.0 for p in points]
        total = [a + b for a, b in zip(below, shares, strict=True)]
        colour, former = colours_of(order)[language], language
        paint = {"color": colour, "alpha": alpha, "edgecolor": PAPER, "lw": 0.6}
        ax.fill_between(x, below, total, **paint)
        if shares[-1] > 0:
            ends.append((s, (below[-1] + total[-1]) / 2, colour))
    ax.set(ylim=(0, max([1e-9, *total])), xlabel="tokens", ylabel="share of tokens")
    ax.margins(x=0)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    token_axis(ax, spans(stages))
    label_ends(ax, ends, height - 0.75)
    return figure


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


def late_limits(ax: Any, lines: Sequence[Points]) -> None:
    """Fit y to what follows the steep start: the first point, or twentieth part."""
    late = [y for line in lines for _, y in line[max(len(line) > 2, len(line) // 20) :]]
    if late and min(late) < max(late):
        pad = 0.06 * (max(late) - min(late))
        ax.set_ylim(min(late) - pad, max(late) + pad)


@styled
def loss_figure(run: Run, languages: Sequence[str]) -> Any:
    """Training loss by language: smoothed, and faintly as it was."""
    height = 5.0
    margins = (0.55, label_width(languages) + 0.15, 0.3, 0.45)
    figure, (ax,) = axes(WIDTH, height, margins=margins)
    ends, lines = [], []
    for language, colour in colours_of(languages).items():
        raw, smooth = loss_points(run, language)
        if smooth:
            ax.plot(*zip(*raw, strict=True), color=colour, alpha=0.22, linewidth=0.7)
            ax.plot(*zip(*smooth, strict=True), color=colour)
            ends.append((language, smooth[-1][1], colour))
            lines.append(smooth)
    late_limits(ax, lines)
    ax.margins(x=0)
    token_axis(ax, run.stages)
    ax.set(xlabel="tokens", ylabel="nats per token")
    label_ends(ax, ends, height - 0.75)
    return figure


@styled
def panels_figure(
    runs: Sequence[Run],
    keys: Sequence[str],
    languages: Sequence[str],
    points_of: Callable[[Run, str], Points],
    ylabel: str,
) -> Any:
    """A small panel per key (a language, or a mean), a line style per run."""
    columns, height = 4, -(-len(keys) // 4) or 1
    figure, grid = axes(
        WIDTH, 1.6 * height + 0.3, height, columns,
        margins=(0.7, 0.1, 0.3, 0.3), gaps=(0.5, 0.4),
    )  # fmt: skip
    for ax in grid[len(keys) :]:
        ax.set_visible(False)
    colours = colours_of(languages)
    by_key = [[points_of(run, key) for run in runs] for key in keys]
    most = max((x for lines in by_key for line in lines for x, _ in line), default=1.0)
    for i, (key, lines, ax) in enumerate(zip(keys, by_key, grid, strict=False)):
        colour = colours.get(key, INK)
        for line, style in zip(lines, itertools.cycle(DASHES), strict=False):
            few = {"marker": "o", "markersize": 3} if len(line) < 30 else {}
            if line:
                ax.plot(*zip(*line, strict=True), color=colour, linestyle=style, **few)
        late_limits(ax, lines)
        ax.set_xlim(-0.04 * most, 1.04 * most)
        ax.set_title(plain(key, 20), color=colour, fontweight="bold")
        token_axis(ax, runs[0].stages, names=False)
        ax.locator_params(nbins=4)
        ax.tick_params(labelbottom=i + columns >= len(keys))
        ax.set_ylabel(ylabel if i % columns == 0 else "")
    return figure


@styled
def sources_figure(run: Run, languages: Sequence[str]) -> Any:
    """Tokens and epochs of each source by stage, and a tick for what was served."""
    planned: dict[tuple[str, str, str], float | None] = {}
    for r in rows(run.lineage, "curriculum", "table"):
        for key in ("tokens", "epochs"):
            where = (key, str(get(r, "source")), str(get(r, "phase")))
            planned[where] = num(r, key)
    phases = list(dict.fromkeys(phase for _, _, phase in planned))
    names = list(dict.fromkeys(source for _, source, _ in planned))
    order = [*languages, *(s.split("/")[0] for s in names)]
    names.sort(key=lambda s: order.index(s.split("/")[0]))
    figure, both = axes(
        WIDTH, 0.24 * len(names) + 0.8, 1, 2,
        margins=(label_width(names), 0.1, 0.3, 0.3), gaps=(0.3, 0.0),
    )  # fmt: skip
    colours = colours_of(languages)
    for ax, key in zip(both, ("tokens", "epochs"), strict=True):
        paint = [colours.get(name.split("/")[0], INK) for name in names]
        ends = [0.0] * len(names)
        for phase, alpha in zip(phases, itertools.cycle((0.9, 0.5)), strict=False):
            parts = [max(0.0, planned.get((key, s, phase)) or 0.0) for s in names]
            look = {"height": 0.66, "color": paint, "alpha": alpha}
            ax.barh(range(len(names)), parts, left=ends, **look)
            ends = [a + b for a, b in zip(ends, parts, strict=True)]
        for i, (name, end) in enumerate(zip(names, ends, strict=True)):
            text = short(end) if key == "tokens" else f"{end:.2f}"
            if all(planned.get((key, name, phase)) is None for phase in phases):
                text = "–"
            last = run.metrics[-1] if run.metrics else {}
            served = num(last, "sources", name, "tokens")
            if key == "tokens" and served is not None:
                ax.plot(served, i, "|", color=INK, markersize=12)
                end = max(end, served)
            near = {"textcoords": "offset points", "va": "center"}
            ax.annotate(text, (end, i), (6, 0), **near)
        name_rows(ax, names, labels=key == "tokens")
        ax.set(title=key, xlim=(0, 1.12 * ax.get_xlim()[1]))
        ax.xaxis.set_major_formatter(lambda v, _: short(v))
        horizontal(ax, 5)
    return figure


@styled
def course_figure(runs: Sequence[Run], name: str, over: str, *keys: str) -> Any:
    """One number over tokens or over time, a line style per run."""
    figure, (ax,) = axes(4.7, 2.2, margins=(0.5, 0.15, 0.3, 0.45))
    total = max(seconds_of(run) for run in runs)
    unit = (3600.0, "hours") if total > 7200 else (60.0, "minutes")
    for run, style in zip(runs, itertools.cycle(DASHES), strict=False):
        points, clock = [], 0.0
        for m in run.metrics:
            seconds, y = num(m, "time", "seconds") or 0.0, num(m, *keys)
            clock += seconds / unit[0]
            x = num(m, "tokens") if over == "tokens" else clock
            if keys[-1] == "data_wait_s":
                y = num(m, "time", "input_s") if y is None else y
                y = 100 * y / seconds if y is not None and seconds else None
            if x is not None and y is not None:
                points.append((x, y))
        if points := points[:: -(-len(points) // 500) or 1]:
            ax.plot(*zip(*points, strict=True), color=INK, linestyle=style, lw=1.2)
    ax.set_title(name)
    ax.set_ylim(0, max(1.05 * ax.get_ylim()[1], 1e-9))
    ax.yaxis.set_major_formatter(lambda v, _: short(v))
    ax.locator_params(nbins=5)
    if over == "tokens":
        token_axis(ax, runs[0].stages, names=False)
    ax.set_xlabel(over if over == "tokens" else unit[1])
    return figure
