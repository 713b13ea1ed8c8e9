"""Panels of dots and of lines as SVG by a template: milliseconds each.

A dot says its value in a tooltip, a line's are read off by templates/page.js, and under
every figure there is a link to its numbers as CSV.

matplotlib takes 50 times as long for small multiples; it draws what must also be saved
as a picture (figures.py). Sizes are in points, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gamayun_jax.report.colours import colours_of
from gamayun_jax.report.formats import fixed, plain
from gamayun_jax.report.html import block, csv_link

if TYPE_CHECKING:
    from markupsafe import Markup

Points = list[tuple[float, float]]
WIDTH = 684.0  # of a figure as wide as the page
INK = "var(--fg)"
FEW = 30  # points of a line that are dots too
DASHES = ("", "7 3", "2 3", "7 3 2 3")  # of runs


class Scale:
    """Values to points along an axis, and the numbers that stand at it.

    Args:
      low, high: ends of the axis.
      size: points from one end to the other.
      count: most intervals between numbers.
      form: how a number is written; default: with as many digits as all need.
      upwards: the greatest value is at 0, as along y.
    """

    def __init__(
        self,
        low: float,
        high: float,
        size: float,
        count: int,
        form: Callable[[float], str] | None = None,
        upwards: bool = False,
    ):
        from matplotlib.ticker import MaxNLocator

        if not high > low:  # all alike: from 0, as shares and bits have none below
            low, high = sorted((0.0, 2.0 * low or 1.0))
        self.low, self.high, self.size, self._upwards = low, high, size, upwards
        at = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        shown = [float(x) for x in at if low <= x <= high]
        digits = 0
        while digits < 6 and any(abs(x - round(x, digits)) > 1e-9 for x in shown):
            digits += 1
        text = form or (lambda x: fixed(x, f".{digits}f"))
        self.ticks = [(self(x), text(x)) for x in shown]

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return round(self.size * (1 - part if self._upwards else part), 2)


@dataclass(frozen=True)
class Dot:
    """A value of one language.

    Args:
      look: solid, large, faint, open, cross, tick or bar (of `low` to `high`).
      low, high: ends of a line through it: an interval, or the way from another value.
      text: beside it.
      name: what it is, in its tooltip and the figure's numbers; "": not there.
    """

    x: float
    look: str = "solid"
    low: float | None = None
    high: float | None = None
    text: str = ""
    name: str = "value"


@dataclass(frozen=True)
class Panel:
    """Dots of languages along one axis.

    Args:
      dots: name -> its dots.
      line: an upright line there: no change, or chance if `dashed`.
      form: how a number along x is written.
      ticks: most intervals along x.
    """

    title: str
    dots: Mapping[str, Sequence[Dot]] = field(default_factory=dict)
    line: float | None = 0.0
    dashed: bool = False
    form: Callable[[float], str] | None = None
    ticks: int = 4

    def told(self, name: str, dot: Dot) -> str:
        """What a dot says of itself: "ru, change: −0.089 (−0.100 … −0.077)"."""
        form = self.form or fixed
        if form is percent:
            form = functools.partial(percent, form=".1f")
        ends = ""
        low, high = dot.low, dot.high
        if dot.look != "open" and low is not None and high is not None and low != high:
            ends = f" ({form(low)} … {form(high)})"
        return f"{plain(name)}, {dot.name}: {form(dot.x)}{ends}"

    def limits(self, names: Iterable[str]) -> tuple[float, float]:
        """Ends of x with some room; bars begin at its end."""
        dots = [dot for name in names for dot in self.dots.get(name, ())]
        values = [v for d in dots for v in (d.x, d.low, d.high) if v is not None]
        values += [] if self.line is None else [self.line]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if low == high == self.line and not self.dashed:  # no change at all
            return low - 0.5, high + 0.5
        room = 0.05 * (high - low)
        if any(d.look == "bar" for d in dots):
            return low, high + 3 * room
        return low - room, high + room


def percent(x: float, form: str = "g") -> str:
    """0.25 -> "25 %"."""
    return f"{fixed(100 * x, form)} %"


@dataclass(frozen=True)
class Line:
    """Points joined by a line.

    Args:
      area: what they go around is filled instead, so faintly: 0 to 1.
      name: in the tooltip and the figure's numbers.
    """

    points: Points
    colour: str = INK
    dash: str = ""
    faint: bool = False
    area: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class LinePanel:
    """Lines over tokens or time.

    Args:
      lines: the first ones are behind the others.
      limits: ends of y; default: the lines'.
      boundaries: upright dashed lines.
      names: (x, name): above the panel.
      ends: (y, name, colour): at the right end of lines.
    """

    title: str
    lines: Sequence[Line]
    xform: Callable[[float], str] | None = None
    yform: Callable[[float], str] | None = None
    xlabel: str = ""
    ylabel: str = ""
    colour: str = INK
    limits: tuple[float, float] | None = None
    boundaries: Sequence[float] = ()
    names: Sequence[tuple[float, str]] = ()
    ends: Sequence[tuple[float, str, str]] = ()


def boxes(
    count: int,
    across: int,
    width: float,
    height: float,
    margins: tuple[float, float, float, float],
    gap: float,
    widths: Sequence[float] | None = None,
) -> tuple[list[tuple[float, float, float]], float]:
    """(left, top, width) of each panel, row by row, and the height of all.

    Args:
      height: of a panel.
      margins: left and right of the figure, above and below each panel.
      gap: between columns.
      widths: of columns, relative.
    """
    left, right, above, below = margins
    shares = widths or [1.0] * across
    room = width - left - right - gap * (across - 1)
    sizes = [room * share / sum(shares) for share in shares]
    places = []
    for i in range(count):
        row, column = divmod(i, across)
        x = left + sum(sizes[:column]) + gap * column
        y = above + row * (above + height + below)
        places.append((round(x, 2), y, round(sizes[column], 2)))
    return places, -(-count // across) * (above + height + below)


def label_width(names: Iterable[str], letters: int = 14) -> float:
    """Points that names of at most so many characters take, about."""
    return 9 + 5.4 * min(letters, max(map(len, names), default=0))


def dots_chart(
    title: str,
    panels: Sequence[Panel],
    names: Sequence[str],
    languages: Iterable[str],
    widths: Sequence[float] | None = None,
    shared: bool = False,
    letters: int = 14,
) -> Markup:
    """Panels side by side, at most four, each with a row for every name.

    Args:
      names: languages, sources or means, from top to bottom.
      languages: the names among them that have a colour.
      widths: of the panels, if they are not alike.
      shared: the panels have the same x.
      letters: most characters of a name.
    """
    colours, step = colours_of(languages), 16.0
    across, height = min(len(panels), 4), step * len(names)
    rows = [(step * (n + 0.5), plain(name, letters)) for n, name in enumerate(names)]
    margins = (label_width(names, letters), 12.0, 22.0, 22.0)
    places, whole = boxes(len(panels), across, WIDTH, height, margins, 18.0, widths)
    limits = [panel.limits(names) for panel in panels]
    if shared:
        ends = min(low for low, _ in limits), max(high for _, high in limits)
        limits = [ends] * len(panels)
    drawn = [
        {
            "panel": panel, "left": left, "top": top, "width": width, "height": height,
            "x": Scale(*ends, width, panel.ticks, panel.form),
            "rows": rows, "first": i % across == 0,
            "dots": [
                (y, dot, colours.get(name.split("/")[0], INK), panel.told(name, dot))
                for (y, _), name in zip(rows, names, strict=True)
                for dot in panel.dots.get(name, ())
            ],
        }
        for i, (panel, (left, top, width), ends) in enumerate(
            zip(panels, places, limits, strict=True)
        )
    ]  # fmt: skip
    numbers = [
        [panel.title, name, dot.name, dot.x, dot.low, dot.high]
        for panel in panels
        for name in names
        for dot in panel.dots.get(name, ())
        if dot.name
    ]
    heads = ("panel", "row", "what", "value", "low", "high")
    return block("dots_chart", title, WIDTH, whole, drawn, csv_link(heads, numbers))


def lines_chart(
    title: str,
    panels: Sequence[LinePanel],
    across: int = 4,
    width: float = WIDTH,
    height: float = 85.0,
) -> Markup:
    """Panels with the same x; only the last of a column has numbers along it.

    Args:
      height: of a panel.
    """
    across = min(across, len(panels)) or 1
    ends = label_width(name for p in panels for _, name, _ in p.ends)
    right = ends + 14 if any(p.ends for p in panels) else 13.0
    below = 34.0 if any(p.xlabel for p in panels) else 6.0
    left = 44.0 if any(p.ylabel for p in panels) else 34.0
    margins = (left, right, 20.0, below)
    places, whole = boxes(len(panels), across, width, height, margins, 38.0)
    lines = [line.points for p in panels for line in p.lines]
    begin = min((x for points in lines for x, _ in points), default=0.0)
    end = max((x for points in lines for x, _ in points), default=1.0)
    dots = (len(x.points) < FEW and not x.area for p in panels for x in p.lines)
    if any(dots):  # room for half a dot
        begin, end = begin - 0.02 * (end - begin), end + 0.02 * (end - begin)
    drawn = []
    for i, (panel, (left, top, size)) in enumerate(zip(panels, places, strict=True)):
        values = [y for line in panel.lines for _, y in line.points]
        low, high = min(values, default=0.0), max(values, default=1.0)
        pad = 0.05 * (high - low)
        low, high = panel.limits or (low - pad, high + pad)
        x = Scale(begin, end, size, 6 if size > 200 else 3, panel.xform)
        y = Scale(low, high, height, 5 if height > 100 else 4, panel.yform, True)
        drawn.append(
            {
                "panel": panel, "left": left, "top": top, "width": size,
                "height": height, "x": x, "y": y, "few": FEW,
                "form": "percent" if panel.yform is percent else "short" if panel.yform
                else "",
                "numbers": i + across >= len(panels), "first": i % across == 0,
                "boundaries": [x(b) for b in panel.boundaries if begin < b < end],
                "ends": spread([(y(v), n, c) for v, n, c in panel.ends], height),
                "paths": [
                    (line, "L".join(f"{x(a)} {y(b)}" for a, b in line.points))
                    for line in panel.lines
                    if line.points
                ],
            }
        )  # fmt: skip
    numbers = [
        [panel.title, line.name, *point]
        for panel in panels
        for line in panel.lines
        for point in line.points
    ]
    link = csv_link(("panel", "line", "x", "y"), numbers)
    return block("lines_chart", title, width, whole + 16, drawn, link)


def spread(
    ends: Sequence[tuple[float, str, str]], height: float
) -> list[tuple[float, float, str, str]]:
    """(y of a line's end, y of its name, name, colour), the names moved apart."""
    ends = sorted((min(max(y, 0.0), height), name, c) for y, name, c in ends)
    places = [y for y, *_ in ends]
    for _ in range(300):
        for a in range(len(places) - 1):
            lack = max(0.0, 11.0 - (places[a + 1] - places[a])) / 2
            places[a] -= lack
            places[a + 1] += lack
    for a in range(len(places)):  # none above the figure
        places[a] = max(places[a], places[a - 1] + 11.0 if a else 0.0)
    lift = max(0.0, max(places, default=0.0) - height)
    return [
        (y, round(place - lift, 2), plain(name, 14), colour)
        for (y, name, colour), place in zip(ends, places, strict=True)
    ]
