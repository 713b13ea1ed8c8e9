"""The parts of all figures: inline SVG by matplotlib, in the colours of the page.

Margins are given, in inches, instead of found by matplotlib's layout engine, and alike
dots are one collection: a page is written several times faster.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gamayun_jax.report.formats import fixed, plain
from gamayun_jax.report.html import LIGHT, block

if TYPE_CHECKING:
    from markupsafe import Markup

INK, PAPER = "#12345a", "#fefdfc"  # become the page's own colours
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
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


@styled
def to_svg(figure: Any, title: str) -> Markup:
    """A figure as a block of a page: the same text for the same figure, in the page's
    font and colours."""
    from markupsafe import Markup, escape
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_visible(False)
    for ax in figure.axes:
        ax.patch.set_visible(False)
    buffer = io.StringIO()
    # Figure.savefig would draw twice, for a layout engine that there is not.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(<text style=\"[^\"]*?) font-family: [^;\"]*;?", r"\1", svg)
    named = f'<svg role="img" aria-label="{escape(plain(title))}" '
    svg = re.sub(r"<svg ([^>]*?)width=\S+ height=\S+ ", rf"{named}\1", svg, count=1)
    names = ["fg", "bg", *(f"c{i}" for i in range(len(LIGHT)))]
    for colour, name in zip([INK, PAPER, *LIGHT], names, strict=True):
        svg = svg.replace(colour, f"var(--{name})")
    return block("figure", Markup(svg))


def colours_of(languages: Iterable[str]) -> dict[str, str]:
    """Language -> its colour on white, by its place among the languages."""
    return dict(zip(languages, itertools.cycle(LIGHT), strict=False))


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
    at = {"transform": ax.get_yaxis_transform(), "clip_on": False}
    for (name, y, colour), place in zip(ends, places, strict=True):
        inside, place = min(max(y, low), high), place + rise
        ax.plot([1.003, 1.018], [inside, place], color=colour, lw=0.8, **at)
        text = {"color": colour, "va": "center", "fontweight": "bold"}
        ax.text(1.022, place, plain(name, 14), **text, **at)


def name_rows(ax: Any, names: Sequence[str], labels: bool = True) -> None:
    """Rows along y, the first at the top, with their names if `labels`."""
    ax.set_ylim(len(names) - 0.4, -0.6)
    if labels:
        ax.set_yticks(range(len(names)), [plain(k, 14) for k in names])
        ax.tick_params(axis="y", length=0)
    else:
        ax.yaxis.set_visible(False)


def horizontal(ax: Any, ticks: int, percent: bool = False) -> None:
    """Lines of the grid across, for values that lie along x, shares in percent."""
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.locator_params(axis="x", nbins=ticks)
    if percent:
        ax.xaxis.set_major_formatter(lambda x, _: fixed(100 * x, "g") + " %")


@dataclass(frozen=True)
class Dot:
    """A value of one language.

    Args:
      look: a name of LOOKS.
      low, high: ends of a line through it: an interval, or the way from another value.
    """

    x: float
    look: str = "solid"
    low: float | None = None
    high: float | None = None


# Marker, its size in square points, opacity.
LOOKS = {
    "solid": ("o", 25, 1.0),
    "large": ("o", 42, 1.0),
    "faint": ("o", 25, 0.35),
    "open": ("o", 25, 0.5),
    "cross": ("x", 20, 0.75),
    "tick": ("|", 110, 0.75),
}


@dataclass(frozen=True)
class Panel:
    """Dots of languages along one axis.

    Args:
      dots: language -> its dots.
      line: an upright line there: no change, or chance if `dashed`.
      ticks: most numbers along x.
    """

    title: str
    dots: Mapping[str, Sequence[Dot]] = field(default_factory=dict)
    line: float | None = 0.0
    dashed: bool = False
    percent: bool = False
    ticks: int = 4


def draw_dots(ax: Any, panel: Panel, names: Sequence[str], colour: Any) -> None:
    """The dots of a panel, a collection for all of the same look."""
    for look, (marker, size, alpha) in LOOKS.items():
        found = [
            (i, dot, INK if look in ("cross", "tick") else colour(name))
            for i, name in enumerate(names)
            for dot in panel.dots.get(name, ())
            if dot.look == look
        ]
        if not found:
            continue
        rows, dots, colours = zip(*found, strict=True)
        for i, dot, c in found:
            if dot.low is not None:
                ax.hlines(i, dot.low, dot.high, color=c, alpha=min(alpha, 1.0))
        paint = {"facecolors": PAPER, "edgecolors": colours} if look == "open" else {}
        style = paint or {"color": colours}
        x = [dot.x for dot in dots]
        ax.scatter(x, rows, size, marker=marker, alpha=alpha, zorder=3, **style)


@styled
def dots_figure(
    panels: Sequence[Panel],
    names: Sequence[str],
    languages: Iterable[str],
    widths: Sequence[float] | None = None,
) -> Any:
    """Panels side by side, at most four, each with a row for every name.

    Args:
      names: languages, and means, from top to bottom.
      languages: all of the page, in the order of their colours.
      widths: of the panels, if they are not alike.
    """
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    height = (0.22 * len(names) + 0.85) * down
    figure, grid = axes(
        WIDTH, height, down, across,
        margins=(label_width(names), 0.15, 0.3, 0.3), gaps=(0.25, 0.6),
        gridspec_kw={"width_ratios": widths or [1] * across},
    )  # fmt: skip
    colours = colours_of(languages)
    for ax in grid[len(panels) :]:
        ax.set_visible(False)
    for i, (ax, panel) in enumerate(zip(grid, panels, strict=False)):
        if panel.line is not None:
            style = {"linestyle": "--"} if panel.dashed else {}
            ax.axvline(panel.line, color=INK, alpha=0.6, linewidth=0.8, **style)
        draw_dots(ax, panel, names, lambda name: colours.get(name, INK))
        name_rows(ax, names, labels=i % across == 0)
        ax.set_title(panel.title)
        horizontal(ax, panel.ticks, panel.percent)
    return figure
