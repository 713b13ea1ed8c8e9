"""Figures by matplotlib: what is saved as a picture; charts.py draws those of pages.

Margins are given, in inches: matplotlib's layout engine draws everything twice.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gamayun_jax.report.colours import LIGHT, colour_number
from gamayun_jax.report.formats import plain, short
from gamayun_jax.report.read_run import Span, entries, num, spans

INK, PAPER = "#12345a", "#fefdfc"
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titley": 1.0,  # found from the ticks' extent, it takes as long as drawing
    "font.size": 9,
    "grid.alpha": 0.13,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "gamayun",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.major.size": 3,
    "xtick.major.width": 0.5,
    "ytick.color": INK,
    "ytick.major.size": 3,
    "ytick.major.width": 0.5,
}  # fmt: skip
WIDTH = 9.5  # inches, of a figure as wide as the page


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Run a drawing function in this page's style; missing glyphs are no warnings."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return draw(*args, **kwargs)

    return wrapped


@functools.cache
def figure_class() -> type:
    """matplotlib's Figure, which shows itself as a cell's output without pyplot."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        @styled
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    return ShownFigure


def axes(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    margins: tuple[float, float, float, float] = (0.55, 0.1, 0.3, 0.45),
    gaps: tuple[float, float] = (0.5, 0.55),
    **kwargs: Any,
) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row.

    Args:
      width, height: inches of the figure.
      margins: inches left, right, above and below the axes.
      gaps: inches between columns, and between rows.
      kwargs: of matplotlib's Figure.subplots.
    """
    figure = figure_class()(figsize=(width, height))
    left, right, top, bottom = margins
    across = (width - left - right - gaps[0] * (columns - 1)) / columns
    down = (height - top - bottom - gaps[1] * (rows - 1)) / rows
    grid = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={
            "left": left / width, "right": 1 - right / width,
            "top": 1 - top / height, "bottom": bottom / height,
            "wspace": gaps[0] / across, "hspace": gaps[1] / down,
            **kwargs.pop("gridspec_kw", {}),
        }, **kwargs,
    )  # fmt: skip
    return figure, list(grid.flat)


def colours_of(languages: Iterable[str]) -> dict[str, str]:
    """Language -> its colour on white."""
    return {k: LIGHT[colour_number(k)] for k in languages}


def label_width(names: Iterable[str]) -> float:
    """Inches that names of at most 14 characters take, about."""
    return 0.12 + 0.075 * min(14, max(map(len, names), default=0))


def label_ends(ax: Any, ends: Sequence[tuple[str, float, str]], height: float) -> None:
    """Write names at the right end of lines, (name, y, colour), moved apart.

    Args:
      height: inches of the axes.
    """
    low, high = ax.get_ylim()
    gap = (high - low) * 0.16 / height
    ends = sorted(ends, key=lambda end: end[1])
    places = [y for _, y, _ in ends]
    for _ in range(300):
        for a in range(len(places) - 1):
            lack = max(0.0, gap - (places[a + 1] - places[a])) / 2
            places[a] -= lack
            places[a + 1] += lack
    rise = max(0.0, low - min(places, default=low))
    rise = rise or min(0.0, high - max(places, default=high))
    at = {"transform": ax.get_yaxis_transform(), "clip_on": False}
    for (name, y, colour), place in zip(ends, places, strict=True):
        inside, place = min(max(y, low), high), place + rise
        ax.plot([1.003, 1.018], [inside, place], color=colour, lw=0.8, **at)
        text = {"color": colour, "va": "center", "fontweight": "bold"}
        ax.text(1.022, place, plain(name, 14), **text, **at)


def token_axis(ax: Any, stages: Sequence[Span]) -> None:
    """Tokens along x; stage boundaries dashed, stage names above."""
    ax.xaxis.set_major_formatter(lambda x, _: short(x))
    ax.locator_params(axis="x", nbins=6)
    low, high = ax.get_xlim()
    for i, (name, begin, end) in enumerate(stages):
        if i and low < begin < high:
            ax.axvline(begin, color=INK, alpha=0.55, lw=0.8, linestyle=(0, (4, 3)))
        middle = (max(begin, low) + min(end, high)) / 2
        if low < middle < high:
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


@styled
def lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    ylabel: str,
    languages: Sequence[str] = (),
    stages: Sequence[Span] = (),
    limits: tuple[float, float] | None = None,
    height: float = 4.0,
) -> Any:
    """A line over tokens for each name, which is at its end.

    Args:
      lines: name -> (tokens, value).
      languages: all of them, in the order of their colours; other names are ink.
      limits: ends of y; default: the lines'.
      height: inches.
    """
    lines = {name: points for name, points in lines.items() if points}
    margins = (0.7, label_width(lines) + 0.15, 0.3, 0.45)
    figure, (ax,) = axes(WIDTH, height, margins=margins)
    colours, ends = colours_of(languages), []
    for name, points in lines.items():
        colour = colours.get(name, INK)
        look = {"color": colour, "marker": "o" if len(points) < 12 else "", "ms": 3}
        ax.plot(*zip(*points, strict=True), **look)
        ends.append((name, points[-1][1], colour))
    ax.set(xlabel="tokens", ylabel=ylabel, **({"ylim": limits} if limits else {}))
    ax.margins(x=0.01)
    token_axis(ax, stages)
    if len(ends) > 1:
        label_ends(ax, ends, height - 0.75)
    return figure
