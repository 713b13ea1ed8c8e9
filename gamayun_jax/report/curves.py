"""What changes over tokens or time: losses, evaluations, rates; and what was served."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.evaluate.paired import MACRO
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
    percent,
)
from gamayun_jax.report.colours import colours_of
from gamayun_jax.report.formats import plain, short
from gamayun_jax.report.read_run import Run, entries, get, num, rows, seconds_of

if TYPE_CHECKING:
    from markupsafe import Markup


Loss = tuple[dict[str, float], dict[str, float]]  # by language: values, weights


def losses(run: Run) -> tuple[list[Loss], str]:
    """Training loss by language, and its mean over languages (MACRO), in each record.

    Returns:
      The losses in the second value's unit: bits per byte, by the bytes per token of
      each source and the tokens that it served in the record; nats per token where the
      run has no such figures of all its sources.
    """
    sizes = {
        name: length / count
        for name, of in entries(run.lineage, "corpus", "sources").items()
        if (length := num(of, "bytes")) and (count := num(of, "tokens"))
    }
    former: dict[str, float] = {}
    known, found = True, []
    for m in run.metrics:
        tokens: dict[str, float] = {}
        size: dict[str, float] = {}
        for name in entries(m, "sources"):
            served = num(m, "sources", name, "tokens") or 0.0
            new, language = max(served - former.get(name, 0.0), 0.0), name.split("/")[0]
            former[name] = served
            known &= not new or name in sizes
            tokens[language] = tokens.get(language, 0.0) + new
            size[language] = size.get(language, 0.0) + new * sizes.get(name, 0.0)
        nats, targets, bits = {}, {}, {}
        for k in entries(m, "languages"):
            if (value := num(m, "languages", k, "nll")) is None:
                continue
            nats[k] = value
            targets[k] = max(1.0, num(m, "languages", k, "targets") or 1.0)
            if size.get(k):
                bits[k] = value / math.log(2) * tokens[k] / size[k]
            else:
                known = False
        found.append((nats, bits, targets))
    made: list[Loss] = []
    for nats, bits, targets in found:
        values = bits if known else nats
        if values:
            values = {MACRO: sum(values.values()) / len(values), **values}
        made.append((values, {MACRO: sum(targets.values()), **targets}))
    return made, "bits per byte" if known else "nats per token"


def loss_points(
    run: Run, language: str, limit: int = 240, of: Sequence[Loss] | None = None
) -> tuple[Points, Points]:
    """(tokens, loss) in about `limit` points, as they are and smoothed.

    Means are over target tokens and never reach across a stage boundary.

    Args:
      of: the run's losses, if they are at hand.
    """

    def mean(part: Sequence[tuple[float, float, float]]) -> float:
        return sum(y * w for _, y, w in part) / sum(w for *_, w in part)

    raw: Points = []
    smooth: Points = []
    size = -(-len(run.metrics) // limit)
    rows = zip(run.metrics, of or losses(run)[0], strict=True)
    for _, group in itertools.groupby(rows, key=lambda row: str(get(row[0], "stage"))):
        weighted = []
        for m, (values, weights) in group:
            x = num(m, "tokens")
            if x is not None and language in values:
                weighted.append((x, values[language], weights[language]))
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


def panels_chart(
    title: str,
    runs: Sequence[Run],
    keys: Sequence[str],
    languages: Sequence[str],
    points_of: Callable[[Run, str], Points],
    ylabel: str = "",
    cut: bool = True,
    faint_of: Callable[[Run, str], Points] | None = None,
    form: Callable[[float], str] | None = None,
    alike: bool = False,
) -> Markup:
    """A small panel per key (a language, or a mean), a line style per run.

    Args:
      cut: leave out the steep start.
      faint_of: what stands faintly behind the lines.
      form: how a number along y is written.
      alike: all panels have the same y, from 0: noise doesn't look like a change.
    """
    colours, panels = colours_of(languages), []
    values = [y for key in keys for run in runs for _, y in points_of(run, key)]
    same = (0.0, 1.05 * max(values, default=1.0) or 1.0)
    for key in keys:
        colour, points = colours.get(key, INK), [points_of(run, key) for run in runs]
        lines = [
            Line(line, colour, dash, name=run.name if len(runs) > 1 else "")
            for run, line, dash in zip(
                runs, points, itertools.cycle(DASHES), strict=False
            )
        ]
        if faint_of:
            behind = (faint_of(run, key) for run in runs)
            raw = [Line(x, colour, faint=True, name="not smoothed") for x in behind]
            lines = [*raw, *lines]
        panels.append(
            LinePanel(
                plain(key, 20), lines, short, form, ylabel=ylabel, colour=colour,
                limits=same if alike else late_limits(points) if cut else None,
                boundaries=boundaries_of(runs[0]),
            )
        )  # fmt: skip
    return lines_chart(title, panels)


def areas_of(points: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[Line]:
    """Shares of sources over tokens, stacked; a language's sources are shades of it."""
    sources = list(dict.fromkeys(s for p in points for s in entries(p, "shares")))
    sources.sort(key=lambda s: order.index(s.split("/")[0]))
    colours, below = colours_of(order), [0.0] * len(points)
    tokens = [num(p, "tokens") or 0.0 for p in points]
    former, shade, areas = "", 0.9, []
    for s in sources:
        language = s.split("/")[0]
        shade, former = 0.9 if language != former else shade * 0.62, language
        shares = [num(p, "shares", s) or 0.0 for p in points]
        above = [a + b for a, b in zip(below, shares, strict=True)]
        edge = [*zip(tokens, above, strict=True)]
        edge += [*zip(tokens, below, strict=True)][::-1]
        areas.append(Line(edge, colours[language], area=shade, name=s))
        below = above
    return areas


def curriculum_chart(title: str, run: Run, languages: Sequence[str]) -> Markup:
    """Shares of sources over tokens, stacked."""
    points = rows(run.lineage, "curriculum", "shares")
    sources = dict.fromkeys(s for p in points for s in entries(p, "shares"))
    areas = areas_of(points, [*languages, *(s.split("/")[0] for s in sources)])
    ends = []
    for area in areas:
        (_, above), (_, below) = area.points[len(points) - 1 : len(points) + 1]
        if above > below:
            ends.append(((above + below) / 2, area.name, area.colour))
    panel = LinePanel(
        "", areas, short, percent, "tokens", "share of tokens", limits=(0.0, 1.0),
        boundaries=boundaries_of(run), ends=ends,
        names=[((begin + end) / 2, name) for name, begin, end in run.stages],
    )  # fmt: skip
    return lines_chart(title, [panel], height=max(240.0, 11.0 * len(ends)))


def rate_chart(title: str, points: Points, run: Run) -> Markup:
    """Learning rate over tokens."""
    panel = LinePanel(
        "", [Line(points)], short, xlabel="tokens", ylabel="learning rate",
        boundaries=boundaries_of(run),
        names=[((begin + end) / 2, name) for name, begin, end in run.stages],
    )  # fmt: skip
    return lines_chart(title, [panel], height=100.0)


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
        if not any(n is not None for (k, *_), n in planned.items() if k == key):
            continue  # epochs, before there is a corpus
        dots: dict[str, list[Dot]] = {}
        for name in names:
            parts = [planned.get((key, name, stage)) for stage in stages]
            begin, bars = 0.0, []
            looks = itertools.cycle(("bar", "bar-light"))
            for stage, part, look in zip(stages, parts, looks, strict=False):
                end = begin + max(0.0, part or 0.0)
                bars.append(Dot(end, look, begin, end, name=f"to the end of {stage}"))
                begin = end
            text = short(begin) if key == "tokens" else f"{begin:.2f}"
            known = any(part is not None for part in parts)
            served = num(last, "sources", name, "tokens") if key == "tokens" else None
            if served is not None:
                bars.append(Dot(served, "tick", name="served"))
            text = text if known else "–"
            label = Dot(max(begin, served or 0.0), "bar", text=text, name="")
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
        shown = points[:: -(-len(points) // 500) or 1]
        lines.append(Line(shown, dash=dash, name=run.name if len(runs) > 1 else ""))
    most = max((y for line in lines for _, y in line.points), default=0.0)
    panel = LinePanel(
        name, lines, xform=short if over == "tokens" else None, yform=short,
        xlabel=over if over == "tokens" else unit, limits=(0.0, max(1.05 * most, 1e-9)),
        boundaries=boundaries_of(runs[0]) if over == "tokens" else (),
    )  # fmt: skip
    return lines_chart(name, [panel], width=338.0, height=100.0)
