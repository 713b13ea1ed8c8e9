"""The figures of the report: inline SVG by matplotlib, in the colours of the page."""

from __future__ import annotations

import functools
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gamayun_jax.report.read_run import (
    DASHES,
    INK,
    PAPER,
    Points,
    Run,
    Span,
    entries,
    esc,
    fixed,
    get,
    label_of,
    languages_of,
    num,
    plain,
    rows,
    score,
    seconds_of,
    short,
    spans,
)

# Of languages, in the order of the config: on white, and on black.
# fmt: off
LIGHT = (
    "#3566d6", "#d93a35", "#14866d", "#9a4fc4", "#dd7a00", "#0b93b8", "#c9307f",
    "#708a12", "#8c5a35", "#66788f", "#b89000", "#4a3fb0",
)
DARK = (
    "#7ba4ff", "#ff7d75", "#3fcbaa", "#cb93f0", "#ffa94a", "#4fcdf0", "#ff85bd",
    "#b3cf54", "#d1a27c", "#a9b9cc", "#ecc94b", "#a79dff",
)
# fmt: on
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
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.13,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "gamayun",
    "text.color": INK,
    "text.parse_math": False,
}  # fmt: skip


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Run a drawing function in this page's style; missing glyphs are no warnings."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return draw(*args, **kwargs)

    return wrapped


def axes(width: float, height: float, *shape: int, **kwargs: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes, row by row, in a list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    grid = list(figure.subplots(*shape, squeeze=False, **kwargs).flat)
    for ax in grid:
        ax.tick_params(colors=INK, length=3, width=0.5)
    return figure, grid


@styled
def to_svg(figure: Any, title: str) -> str:
    """Inline SVG: the same text for the same figure, in the page's font and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(<text style=\"[^\"]*?) font-family: [^;\"]*;?", r"\1", svg)
    named = f'<svg role="img" aria-label="{esc(title)}" '
    svg = re.sub(r"<svg ([^>]*?)width=\S+ height=\S+ ", rf"{named}\1", svg, count=1)
    names = ["fg", "bg", *(f"c{i}" for i in range(len(LIGHT)))]
    for colour, name in zip([INK, PAPER, *LIGHT], names, strict=True):
        svg = svg.replace(colour, f"var(--{name})")
    return f'<div class="scroll">{svg}</div>'


def colours_of(languages: Iterable[str]) -> dict[str, str]:
    return dict(zip(languages, itertools.cycle(LIGHT), strict=False))


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


def label_ends(
    ax: Any, ends: Sequence[tuple[str, float, str]], part: float = 1.0
) -> None:
    """Write names at the right end of lines, (name, y, colour), moved apart.

    `part`: of the figure's height that the axes have.
    """
    low, high = ax.get_ylim()
    gap = (high - low) * 0.178 / (part * ax.figure.get_figheight())
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
    figure, (ax,) = axes(9.5, max(4.0, 0.18 * len(sources) + 1.2))
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
    label_ends(ax, ends)
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
        found = []
        for m in group:
            x, y = num(m, "tokens"), num(m, "languages", language, "nll")
            weight = num(m, "languages", language, "targets") or 1.0
            if x is not None and y is not None:
                found.append((x, y, max(1.0, weight)))
        width = max(1, len(run.metrics) // 40)
        for i in range(0, len(found), size):
            reach = min(width, i, len(found) - 1 - i)
            raw.append((found[i][0], mean(found[i : i + size])))
            smooth.append((found[i][0], mean(found[i - reach : i + reach + 1])))
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
    figure, (ax,) = axes(9.5, 5.0)
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
    label_ends(ax, ends)
    return figure


@styled
def panels_figure(
    runs: Sequence[Run],
    keys: Sequence[str],
    colours: Mapping[str, str],
    points_of: Callable[[Run, str], Points],
    ylabel: str,
) -> Any:
    """A small panel per key (a language, or a mean), a line style per run."""
    columns, height = 4, -(-len(keys) // 4) or 1
    figure, grid = axes(9.5, 1.6 * height + 0.3, height, columns, sharex=True)
    for ax in grid[len(keys) :]:
        ax.set_visible(False)
    for i, (key, ax) in enumerate(zip(keys, grid, strict=False)):
        lines, colour = [points_of(run, key) for run in runs], colours.get(key, INK)
        for line, style in zip(lines, itertools.cycle(DASHES), strict=False):
            few = {"marker": "o", "markersize": 3} if len(line) < 30 else {}
            if line:
                ax.plot(*zip(*line, strict=True), color=colour, linestyle=style, **few)
        late_limits(ax, lines)
        ax.set_title(plain(key, 20), color=colour, fontweight="bold")
        token_axis(ax, runs[0].stages, names=False)
        ax.locator_params(nbins=4)
        ax.tick_params(labelbottom=i + columns >= len(keys))
        ax.set_ylabel(ylabel if i % columns == 0 else "")
    return figure


def change_line(ax: Any, y: float, change: Any, colour: str) -> None:
    """A change (stages.Change) and its interval, faint within noise."""
    cell = change.cell
    look = {"color": colour, "alpha": 0.35 if change.verdict == "same" else 1.0}
    if cell.low is not None:
        ax.plot([cell.low, cell.high], [y, y], **look)
    ax.plot(cell.difference, y, "o", markersize=5, **look)


@styled
def stage_figure(
    run: Run,
    name: str,
    languages: Sequence[str],
    changes: Mapping[str, Any],
) -> Any:
    """By language: bits per byte before and after the stages, with baselines; what the
    last stage changed (`changes`: language -> stages.Change), faint within noise; bits
    for the same content relative to English's."""
    evals = run.tests(name)
    tested = languages_of(evals, name)
    shown = [*(k for k in languages if k in tested), "macro"]
    shape = {"sharey": True, "width_ratios": (2.2, 1, 1)}
    figure, (left, middle, right) = axes(9.5, 0.25 * len(shown) + 0.9, 1, 3, **shape)
    for i, language in enumerate(shown):
        colour = colours_of(languages).get(language, INK)
        results = [score(e, name, language) for e in evals]
        left.axhline(i, color=INK, alpha=0.12, linewidth=0.6)
        for key, mark, size in (("unigram", "x", 5.0), ("xz", "|", 11.0)):
            base = num(results[-1], "baselines", key)
            if base is not None:
                left.plot(base, i, mark, color=INK, markersize=size, alpha=0.75)
        known = [v for r in results if (v := num(r, "bits_per_byte")) is not None]
        if known:
            left.plot([known[0], known[-1]], [i, i], color=colour, alpha=0.35)
        for ax, key, back in ((left, "bits_per_byte", 0), (right, "parity", -2)):
            for k, r in list(enumerate(results))[back:]:
                last, value = k == len(results) - 1, num(r, key)
                face = colour if k or last else PAPER
                size, alpha = (6.5, 1.0) if last else (5.0, 0.5)
                look = {"color": colour, "markerfacecolor": face, "alpha": alpha}
                if value is not None:
                    ax.plot(value, i, "o", markersize=size, **look)
        if language in changes:
            change_line(middle, i, changes[language], colour)
    left.set_yticks(range(len(shown)), [plain(k, 14) for k in shown])
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.set_title("bits per byte")
    middle.set_title(f"change in {plain(get(evals[-1], 'stage') or 'the last', 16)}")
    middle.axvline(0, color=INK, alpha=0.6, linewidth=0.8)
    right.set_title("bits per unit, English = 1")
    right.axvline(1, color=INK, alpha=0.6, linewidth=0.8)
    for ax in (left, middle, right):
        horizontal(ax, 8 if ax is left else 4)
    return figure


@styled
def quantised_figure(evals: Sequence[Any], name: str, languages: Sequence[str]) -> Any:
    """By language: what each quantisation added to the bits per byte of the first."""
    tested = languages_of(evals, name)
    shown = [*(k for k in languages if k in tested), "macro"]
    figure, panels = axes(9.5, 0.22 * len(shown) + 0.8, 1, len(evals) - 1, sharey=True)
    for ax, e in zip(panels, evals[1:], strict=True):
        for i, language in enumerate(shown):
            found = [score(x, name, language) for x in (evals[0], e)]
            old, new = (num(r, "bits_per_byte") for r in found)
            if old is not None and new is not None:
                colour = colours_of(languages).get(language, INK)
                ax.barh(i, new - old, color=colour, height=0.62)
        ax.set_yticks(range(len(shown)), [plain(k, 14) for k in shown])
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.set_title(f"bits per byte added by {label_of(e)}")
        ax.axvline(0, color=INK, alpha=0.6, linewidth=0.8)
        horizontal(ax, 5)
    return figure


def horizontal(ax: Any, ticks: int, percent: bool = False) -> None:
    """Lines of the grid across, for values that lie along x, shares in percent."""
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.locator_params(axis="x", nbins=ticks)
    ax.tick_params(axis="y", length=0)
    if percent:
        ax.xaxis.set_major_formatter(lambda x, _: fixed(100 * x, "g") + " %")


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
    figure, both = axes(9.5, 0.24 * len(names) + 0.8, 1, 2, sharey=True)
    for ax, key in zip(both, ("tokens", "epochs"), strict=True):
        for i, name in enumerate(names):
            colour = colours_of(languages).get(name.split("/")[0], INK)
            end = 0.0
            parts = [planned.get((key, name, phase)) for phase in phases]
            for width, alpha in zip(parts, itertools.cycle((0.9, 0.5)), strict=False):
                width = max(0.0, width or 0.0)
                ax.barh(i, width, left=end, height=0.66, color=colour, alpha=alpha)
                end += width
            text = short(end) if key == "tokens" else f"{end:.2f}"
            text = "–" if parts.count(None) == len(parts) else text
            for m in run.metrics[-1:] if key == "tokens" else ():
                served = num(m, "sources", name, "tokens")
                if served is not None:
                    ax.plot(served, i, "|", color=INK, markersize=12)
                    end = max(end, served)
            near = {"textcoords": "offset points", "va": "center"}
            ax.annotate(text, (end, i), (6, 0), **near)
        ax.set(title=key, xlim=(0, 1.12 * ax.get_xlim()[1]))
        ax.xaxis.set_major_formatter(lambda v, _: short(v))
        horizontal(ax, 5)
    both[0].set_yticks(range(len(names)), [plain(s, 18) for s in names])
    both[0].set_ylim(len(names) - 0.4, -0.6)
    return figure


@styled
def course_figure(runs: Sequence[Run], name: str, over: str, *keys: str) -> Any:
    """One number over tokens or over time, a line style per run."""
    figure, (ax,) = axes(4.7, 2.2)
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
