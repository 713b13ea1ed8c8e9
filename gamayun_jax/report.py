"""A self-contained HTML report of one run, or of several overlaid, and text tables.

All of it comes from the run folders' records (records.py). Every field is optional:
what is missing leaves a labelled gap. Names are data: a text gets into the page only
through `esc`, or through matplotlib, which escapes it. Nothing is loaded.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.files import write_text

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
INK, PAPER = "#12345a", "#fefdfc"  # become the page's own colours
DASHES, SVG_DASHES = ("-", "--", ":", "-."), ("", "7 3", "2 3", "7 3 2 3")  # of runs
BASELINES = {"uniform": "uniform", "unigram": "unigram", "xz": "xz -9e"}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": INK, "axes.grid": True,
    "axes.grid.axis": "y", "axes.labelcolor": INK, "axes.linewidth": 0.5,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left",
    "axes.titlesize": 9, "figure.constrained_layout.use": True, "font.size": 9,
    "grid.alpha": 0.13, "grid.color": INK, "grid.linewidth": 0.6,
    "lines.linewidth": 1.5, "svg.fonttype": "none", "svg.hashsalt": "gamayun",
    "text.color": INK, "text.parse_math": False,
}  # fmt: skip
Span = tuple[str, float, float]  # name, first and last token of a stage
Points = list[tuple[float, float]]


# --- records --------------------------------------------------------------------


def get(data: Any, *keys: str) -> Any:
    """data[key][key]..., or None where any of it is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def num(data: Any, *keys: str) -> float | None:
    """The finite number there, or None."""
    value = get(data, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e18 else None


def entries(data: Any, *keys: str) -> dict[str, Any]:
    """The mapping there, or an empty one."""
    value = get(data, *keys)
    return dict(value) if isinstance(value, Mapping) else {}


def rows(data: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The mappings in the list there."""
    value = get(data, *keys)
    return [r for r in value if isinstance(r, Mapping)] if type(value) is list else []


@dataclass(frozen=True)
class Run:
    """The records of one run folder."""

    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    metrics: list[dict[str, Any]]  # of kind "train"
    evals: list[dict[str, Any]]  # by step
    unread: int  # lines of metrics.jsonl that are no JSON

    @property
    def stages(self) -> list[Span]:
        return spans(rows(self.lineage, "stages"))

    @property
    def languages(self) -> list[str]:
        known = get(self.config, "languages")
        found = [k for k in known if isinstance(k, str)] if type(known) is list else []
        found += [k for m in self.metrics[-1:] for k in entries(m, "languages")]
        found += [k for s in sets_of(self.evals) for k in languages_of(self.evals, s)]
        return list(dict.fromkeys(found))

    @property
    def stage_evals(self) -> list[dict[str, Any]]:
        """The evaluations before training and at the stages' ends; else all."""
        return [e for e in self.evals if get(e, "label")] or self.evals

    def tests(self, name: str) -> list[dict[str, Any]]:
        """The same for one held-out set."""
        found = [e for e in self.evals if languages_of([e], name)]
        return [e for e in found if e in self.stage_evals] or found


def spans(stages: Iterable[Any]) -> list[Span]:
    found = [(s, num(s, "start_tokens"), num(s, "end_tokens")) for s in stages]
    return [
        (plain(get(s, "name"), 16), begin, end)
        for s, begin, end in found
        if begin is not None and end is not None
    ]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
      UserError: no run folder, or a record that is not JSON.
    """
    config, lineage, path = (
        folder / n for n in ("config.json", "lineage.json", "metrics.jsonl")
    )
    if not (config.is_file() or lineage.is_file() or path.is_file()):
        raise UserError(
            f"{folder} is no run folder (it has no config.json, lineage.json or "
            "metrics.jsonl): give the --workdir of `gamayun train`"
        )

    def load(path: Path) -> dict[str, Any]:
        try:
            return entries(json.loads(path.read_text("utf-8"))) if path.exists() else {}
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is damaged ({e}): restore or delete it") from e

    metrics: list[dict[str, Any]] = []
    unread = 0
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        try:
            record: Any = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            unread += 1
            continue
        if get(record, "kind") == "train":
            metrics.append(record)
    evals = [load(p) for p in sorted((folder / "eval").glob("*.json"))]
    evals.sort(key=lambda e: num(e, "step") or 0.0)
    name = plain(folder.resolve().name)
    return Run(name, load(config), load(lineage), metrics, evals, unread)


def sets_of(evals: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(s for e in evals for s in entries(e, "sets")))


def languages_of(evals: Iterable[Any], name: str) -> list[str]:
    found = (entries(e, "sets", name, "languages") for e in evals)
    return list(dict.fromkeys(itertools.chain(*found)))


def score(record: Any, name: str, language: str) -> dict[str, Any]:
    """The results of a language, or of "macro" or "micro", on a held-out set."""
    part = get(record, "sets", name)
    mean = entries(part, language) if language in ("macro", "micro") else {}
    return entries(part, "languages", language) or mean


def change(new: Any, old: Any) -> tuple[float, float, str] | None:
    """new - old in bits per byte, its standard error, and what that means.

    The errors are combined as if the two scored different texts. They score the same,
    so the true error is smaller.
    """
    a, b = num(old, "bits_per_byte"), num(new, "bits_per_byte")
    if a is None or b is None:
        return None
    error = math.hypot(*(num(x, "bits_per_byte_se") or 0.0 for x in (old, new)))
    verdict = "same" if abs(b - a) <= 2 * error else "better" if b < a else "worse"
    return b - a, error, verdict


def beaten(record: Any, name: str, key: str) -> str:
    """ "below xz -9e: 3 of 12 languages"."""
    found = [score(record, name, k) for k in languages_of([record], name)]
    pairs = [(num(r, "bits_per_byte"), num(r, "baselines", key)) for r in found]
    known = [a < b for a, b in pairs if a is not None and b is not None]
    return f"below {BASELINES[key]}: {sum(known)} of {len(known)} languages"


# --- text -----------------------------------------------------------------------


def plain(value: Any, limit: int = 60) -> str:
    """Any value as one printable line of at most `limit` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def esc(value: Any, limit: int = 60) -> str:
    return html.escape(plain(value, limit), quote=True)


def short(value: float | None) -> str:
    """1234567 -> "1.23M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value is not None and abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return "–" if value is None else f"{value:.3g}"


def fixed(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def label_of(record: Any, limit: int = 24) -> str:
    return plain(get(record, "label") or f"step {get(record, 'step')}", limit)


def language_table(
    evals: Sequence[Mapping[str, Any]], languages: Sequence[str] = ()
) -> str:
    """Plain-text bits per byte by language: a column per evaluation, and baselines.

    Of more than four evaluations, the first and the last three are shown.
    """
    shown = list(evals) if len(evals) <= 4 else [evals[0], *evals[-3:]]
    lines: list[str] = []
    for name in sets_of(shown):
        heads = "".join(f"{label_of(e, 14):>16}" for e in shown)
        lines += [
            f"bits per byte on held-out set {plain(name)!r} (± standard error)",
            f"{'':<7}{heads}{'unigram':>9}{'xz -9e':>8}{'acc.':>7}{'parity':>8}",
        ]
        found = languages_of(shown, name)
        order = [k for k in languages if k in found]
        for language in dict.fromkeys([*order, *found, "macro", "micro"]):
            results = [score(e, name, language) for e in shown]
            line = f"{plain(language, 6):<7}"
            for r in results:
                error = num(r, "bits_per_byte_se")
                cell = fixed(num(r, "bits_per_byte"))
                line += f"{cell + (f' ±{error:.3f}' if error is not None else ''):>16}"
            base = [num(results[-1], "baselines", k) for k in ("unigram", "xz")]
            line += "".join(
                f"{'' if b is None else fixed(b):>{w}}"
                for b, w in zip(base, (9, 8), strict=True)
            )
            parity = num(results[-1], "parity")
            line += f"{fixed(num(results[-1], 'accuracy'), '.1%'):>7}"
            lines.append(line + f"{'' if parity is None else fixed(parity):>8}")
        lines += [*(beaten(shown[-1], name, key) for key in ("unigram", "xz")), ""]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def run_table(folder: Path) -> str:
    """The per-language table of a run: before, and after each stage."""
    run = read_run(folder)
    return language_table(run.stage_evals, run.languages) or "no evaluation in this run"


def curriculum_table(table: Sequence[Mapping[str, Any]], seq_len: int) -> str:
    """Plain-text table: share, tokens and epochs per stage and source."""
    heads = f"{'share':>8}{'tokens':>12}{'epochs':>9}{'in all':>9}"
    lines, former = [f"{'stage':<12}{'source':<16}{heads}"], None
    for r in table:
        if former not in (None, r["phase"]):
            lines.append("")
        former = r["phase"]
        lines.append(
            f"{r['phase']:<12}{r['source']:<16}{r['share']:>8.2%}"
            f"{short(r['examples'] * seq_len):>12}{r['epochs']:>9.2f}"
            f"{r['epochs_total']:>9.2f}"
        )
    return "\n".join(lines)


# --- figures --------------------------------------------------------------------


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


def label_ends(ax: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write names at the right end of lines, (name, y, colour), moved apart."""
    low, high = ax.get_ylim()
    gap = (high - low) * 0.178 / ax.figure.get_figheight()
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


@styled
def stage_figure(run: Run, name: str, languages: Sequence[str]) -> Any:
    """By language: bits per byte before and after the stages, with baselines; what the
    last stage changed; bits for the same content relative to English's."""
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
        delta = change(results[-1], results[-2]) if len(results) > 1 else None
        if delta:
            middle.errorbar(delta[0], i, xerr=2 * delta[1], fmt="o", color=colour)
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


def horizontal(ax: Any, ticks: int) -> None:
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.locator_params(axis="x", nbins=ticks)
    ax.tick_params(axis="y", length=0)


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


# --- page -----------------------------------------------------------------------


def seconds_of(run: Run) -> float:
    return sum(num(m, "time", "seconds") or 0.0 for m in run.metrics)


def td(text: str, value: float | None = None, kind: str = "") -> str:
    """A cell of HTML, sorted by `value`."""
    return f'<td class="{kind}" data-v="{"" if value is None else value}">{text}</td>'


def html_table(heads: Iterable[str], body: Iterable[str], foot: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col" tabindex="0">{esc(h)}</th>' for h in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>'
        f"{''.join(body)}</tbody><tfoot>{''.join(foot)}</tfoot></table></div>"
    )


def score_table(
    columns: Sequence[tuple[str, Any, str, Any]],
    name: str,
    languages: Sequence[str],
    baselines: bool,
) -> str:
    """Bits per byte by language.

    Args:
      columns: heading, evaluation, heading of its change, and the evaluation that
        the change is from (None: no such column).
      baselines: add the last evaluation's baselines, accuracy and parity.
    """
    tested = languages_of((e for _, e, _, _ in columns), name)
    shown = [k for k in languages if k in tested]
    heads = ["language"]
    for head, _, versus, old in columns:
        heads += [head, versus] if old else [head]
    parts = []
    for i, language in enumerate((*shown, "macro", "micro")):
        mean = i >= len(shown)
        dot = (
            f'<i style="background:var(--c{languages.index(language) % 12})"></i>'
            if (not mean)
            else ""
        )
        cells = td(dot + esc(language, 20), i)
        for _, e, _, old in columns:
            last = score(e, name, language)
            value, error = num(last, "bits_per_byte"), num(last, "bits_per_byte_se")
            small = "" if error is None else f"<small> ±{error:.3f}</small>"
            cells += td(fixed(value) + small, value)
            delta = change(last, score(old, name, language))
            if delta:
                small = f"<small> ±{delta[1]:.3f}</small>"
                cells += td(fixed(delta[0], "+.3f") + small, delta[0], delta[2])
            elif old:
                cells += td("–")
        for key in BASELINES if baselines else ():
            base = num(last, "baselines", key)
            won = base is not None and value is not None and value < base
            cells += td("" if mean else fixed(base), base, "better" if won else "")
        if baselines:
            right, parity = num(last, "accuracy"), num(last, "parity")
            cells += td(fixed(right, ".1%"), right) + td(fixed(parity), parity)
        parts.append(f"<tr>{cells}</tr>")
    heads += [*BASELINES.values(), "accuracy", "parity"] if baselines else []
    return html_table(heads, parts[: len(shown)], parts[len(shown) :])


def facts(run: Run) -> dict[str, str]:
    """The headline numbers."""
    last = run.metrics[-1] if run.metrics else {}
    rates = sorted(num(m, "time", "tokens_per_s") or 0.0 for m in run.metrics)
    time = seconds_of(run)
    found = {
        "parameters": short(num(run.lineage, "parameters")),
        "tokens": short(num(last, "tokens")),
        "stages": " → ".join(name for name, *_ in run.stages) or "–",
        "languages": str(len(run.languages) or "–"),
        "time": f"{time / 3600:.1f} h" if time > 5400 else f"{time / 60:.1f} min",
        "tokens/s (median)": short(rates[len(rates) // 2] if rates else None),
        "device": plain(get(run.lineage, "device") or "–", 30),
    }
    for name in sets_of(run.evals):
        values = [num(score(e, name, "macro"), "bits_per_byte") for e in run.evals]
        ends = f"{fixed(values[0], '.2f')} → {fixed(values[-1], '.2f')}"
        found[f"bits per byte, {plain(name, 20)}"] = ends
    return found


def chain_html(run: Run) -> str:
    """The chain that led to the model, oldest first."""
    chain: list[dict[str, Any]] = []
    lineage, items = run.lineage, []
    while lineage and len(chain) < 50:
        chain.append(lineage)
        lineage = entries(lineage, "init_from", "lineage")
    for part in reversed(chain):
        origin = entries(part, "init_from")
        if origin:
            kept = ("checkpoint", "step", "tokens", "restarted")
            text = "; ".join(f"{k}: {get(origin, k)}" for k in kept if get(origin, k))
            items.append(f"<li class=from>↓ from {esc(text, 300)}")
        elif get(part, "parents"):
            items.append(f"<li class=from>↓ from {esc(get(part, 'parents'), 300)}")
        name, started, device = (
            get(part, k) or "–" for k in ("run", "started", "device")
        )
        sources = entries(part, "corpus", "sources").values()
        size = short(sum(num(s, "tokens") or 0.0 for s in sources))
        recipe, tokenizer = (
            str(get(part, "corpus", k) or "–")[:12] for k in ("recipe", "tokenizer")
        )
        versions = ", ".join(f"{k} {v}" for k, v in entries(part, "versions").items())
        items.append(
            f"<li><b>run {esc(name)}</b>, started {esc(started)}, {esc(device)}<p>"
            f"corpus <code>{esc(recipe)}</code> ({len(sources)} sources, {size} tokens)"
            f", tokenizer <code>{esc(tokenizer)}</code><br>"
            f"{esc(versions or 'versions not recorded', 300)}</p>"
        )
        for stage, begin, end in spans(rows(part, "stages")):
            saved = [
                f"<span>step {esc(get(c, 'step'))}, {short(num(c, 'tokens'))}, "
                f"{esc(get(c, 'reason') or '–')}</span>"
                for c in rows(part, "checkpoints")
                if plain(get(c, "stage"), 16) == stage
            ]
            saved = saved if len(saved) < 6 else [*saved[:2], "…", *saved[-2:]]
            items.append(
                f"<li class=stage><b>stage {esc(stage)}</b>, {short(begin)} → "
                f"{short(end)} tokens; checkpoints: {''.join(saved) or 'none'}"
            )
        events = rows(part, "events")
        if events:
            text = "".join(
                "<li>" + "; ".join(f"{esc(k)}: {esc(v, 120)}" for k, v in e.items())
                for e in events[-200:]
            )
            text = f"<summary>events: {len(events)}</summary><ul>{text}</ul>"
            items.append(f"<li><details>{text}</details>")
    return f"<ol class=chain>{''.join(items)}</ol>" if items else gap("lineage.json")


def gap(what: str) -> str:
    return f'<p class="gap">Not recorded in this run: {esc(what)}.</p>'


def legend(runs: Sequence[Run]) -> str:
    """The runs' line styles."""
    items = "".join(
        '<span><svg viewBox="0 0 36 8" aria-hidden="true"><path d="M0 4H36" '
        f'stroke="currentColor" stroke-width="2" stroke-dasharray="{dash}"/></svg>'
        f"{esc(run.name)}</span>"
        for run, dash in zip(runs, itertools.cycle(SVG_DASHES), strict=False)
    )
    return f'<div class="legend">{items}</div>' if len(runs) > 1 else ""


def variables(colours: Iterable[str]) -> str:
    return "".join(f"--c{i}:{c};" for i, c in enumerate(colours))


CSS = (
    f"""
:root{{color-scheme:light dark;--fg:#1d2530;--bg:#fff;--soft:#5d6877;--line:#dde2e8;
--good:#0b7a55;--bad:#c02a22;--card:#f4f6f8;{variables(LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{--fg:#e3e8ee;--bg:#13171c;--soft:#9ba7b5;
--line:#2d3540;--good:#4fd0a0;--bad:#ff8277;--card:#1c2229;{variables(DARK)}}}}}
"""
    + """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
color:var(--fg);background:var(--bg);max-width:1080px;margin:0 auto;
padding:1.6rem 1rem 4rem;overflow-wrap:anywhere}
h1{font-size:1.8rem;line-height:1.2;margin:0}h2{font-size:1.25rem;margin:3rem 0 .2rem}
p{color:var(--soft);margin:.2rem 0 .8rem;max-width:80ch}
small{color:var(--soft);font-size:.8em}.scroll{overflow-x:auto;margin:.6rem 0}
svg{display:block;width:100%;min-width:640px;height:auto}.grid svg{min-width:0}
svg *{stroke-linejoin:round;stroke-linecap:butt}svg text{font-family:inherit}
.grid{display:grid;gap:.4rem 1.4rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
table{border-collapse:collapse;font-size:.875rem;width:100%;
font-variant-numeric:tabular-nums}
th,td{padding:.28rem .55rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}th{color:var(--soft);font-weight:600;cursor:pointer}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;
background:var(--bg)}
th[aria-sort=ascending]:after{content:" ▲"}th[aria-sort=descending]:after{content:" ▼"}
tfoot td{font-weight:600;border-bottom:0}
tfoot tr:first-child td{border-top:2px solid var(--line)}
i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.better{color:var(--good)}.worse{color:var(--bad)}.same{color:var(--soft)}
.cards,.legend{display:flex;flex-wrap:wrap;gap:.6rem;margin:1.2rem 0}
.cards div{background:var(--card);border-radius:.5rem;padding:.5rem .9rem}
.cards span{color:var(--soft);font-size:.8rem}
.cards b{display:block;font-size:1.1rem;font-weight:600}
.legend{gap:.1rem 1.2rem;margin:.3rem 0;font-size:.875rem;max-width:none}
.legend svg{display:inline-block;width:2.4em;min-width:0;margin-right:.4em}
.gap{border:1px dashed var(--line);border-radius:.5rem;padding:.6rem .9rem}
.chain{list-style:none;padding:0;margin:.8rem 0}.chain .stage{border-color:var(--c0)}
.chain>li{border-left:3px solid var(--line);padding:.3rem 0 .3rem 1rem}
.chain .from{color:var(--soft);font-style:italic}.chain p{margin:0;font-size:.875rem}
.chain span{display:inline-block;background:var(--card);border-radius:.4rem;
padding:0 .5rem;margin:.1rem .3rem .1rem 0;font-size:.8rem}
"""
)
SORT = """
document.querySelectorAll("table").forEach(t=>[...t.tHead.rows[0].cells].forEach((h,i)=>{
const go=()=>{const d=h.getAttribute("aria-sort")=="ascending"?-1:1;
const v=r=>r.cells[i].dataset.v;
[...t.tHead.rows[0].cells].forEach(x=>x.removeAttribute("aria-sort"));
h.setAttribute("aria-sort",d>0?"ascending":"descending");
[...t.tBodies[0].rows].sort((a,b)=>(v(a)=="")-(v(b)=="")||d*(v(a)-v(b)))
.forEach(r=>t.tBodies[0].append(r))};
h.onclick=go;h.onkeydown=e=>{if(e.key=="Enter")go()}}))
"""
MARKS = (
    "Changes beyond two standard errors are green (better) or red (worse). The errors "
    "are combined as if the texts differed; they do not, so this is cautious."
)
STAGE_LEGEND = (
    '<p class="legend"><span>○ before</span><span>● faint: after a stage</span>'
    "<span>● at the end</span><span>| xz -9e</span><span>× token unigram</span>"
    "<span>— ± two standard errors</span></p>"
)
COURSE = (
    ("learning rate", "tokens", "lr"),
    ("gradient norm", "tokens", "grad_norm"),
    ("tokens per second", "time", "time", "tokens_per_s"),
    ("waiting for data, % of the time", "time", "time", "data_wait_s"),
)


def bpb_points(run: Run, language: str, name: str) -> Points:
    found = [(num(e, "tokens"), score(e, name, language)) for e in run.evals]
    pairs = [(x, num(r, "bits_per_byte")) for x, r in found]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def heldout_sections(runs: Sequence[Run], languages: Sequence[str]) -> Iterable[str]:
    many = len(runs) > 1
    for name in sets_of(e for r in runs for e in r.evals):
        tested = languages_of((e for r in runs for e in r.evals), name)
        if many:
            last = [[e for e in r.evals if languages_of([e], name)][-1:] for r in runs]
            ends = [e[0] if e else {} for e in last]
            columns = [
                (r.name, e, f"− {runs[0].name}", ends[0] if k else None)
                for k, (r, e) in enumerate(zip(runs, ends, strict=True))
            ]
            text = f"Bits per byte at the last evaluation (lower is better). {MARKS}"
            table = score_table(columns, name, languages, baselines=False)
            yield section(f"Runs compared on “{name}”", text, table)
        if many or any(len(r.evals) > len(r.stage_evals) for r in runs):
            figure = panels_figure(
                runs,
                ["macro", *(k for k in languages if k in tested)],
                colours_of(languages),
                functools.partial(bpb_points, name=name),
                "bits per byte",
            )
            text = "Every panel has its own scale; the steep start is cut off."
            svg = to_svg(figure, f"Bits per byte on {name} over tokens")
            yield section(
                f"Bits per byte over training, “{name}”", text, legend(runs), svg
            )
    for run, name in ((r, s) for r in runs for s in sets_of(r.evals) if r.tests(s)):
        evals = run.tests(name)
        columns = [
            (label_of(e), e, "change", evals[k - 1] if k else None)
            for k, e in enumerate(evals)
        ]
        won = "; ".join(beaten(evals[-1], name, k) for k in ("unigram", "xz"))
        text = (
            f"Bits per byte ± standard error (lower is better). {MARKS} A baseline "
            f"that the model beats is green; {won}. Parity: bits for the same content, "
            "relative to English. Click a heading to sort."
        )
        yield section(
            f"{of_run(run, runs)}Held-out set “{name}” by language",
            text,
            score_table(columns, name, languages, baselines=True),
            to_svg(stage_figure(run, name, languages), f"Results on {name}"),
            STAGE_LEGEND,
        )


def of_run(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def section(title: str, text: str, *content: str) -> str:
    """A heading and a paragraph, whose text is HTML already, and what follows."""
    return f"<h2>{esc(title, 120)}</h2><p>{text}</p>{''.join(content)}"


def training_sections(runs: Sequence[Run], languages: Sequence[str]) -> Iterable[str]:
    title = "Training loss by language"
    text = "Nats per target token, unweighted, smoothed; the steep start is cut off."
    if len(runs) > 1:
        figure = panels_figure(
            runs,
            languages,
            colours_of(languages),
            lambda run, language: loss_points(run, language)[1],
            "nats per token",
        )
    else:
        figure = loss_figure(runs[0], languages)
    yield section(title, text, legend(runs), to_svg(figure, title))
    text = "Compiling, evaluating and saving do not count in the throughput."
    small = "".join(to_svg(course_figure(runs, *c), c[0]) for c in COURSE)
    yield section("Course", text, legend(runs), f'<div class="grid">{small}</div>')


def origin_sections(run: Run, who: str, languages: Sequence[str]) -> Iterable[str]:
    points = rows(run.lineage, "curriculum", "shares")
    content = gap("curriculum.shares in lineage.json")
    if points:
        figure = curriculum_figure(points, languages, rows(run.lineage, "stages"))
        content = to_svg(figure, "Share of each source over tokens")
    text = "Share of each source in the tokens trained on, stacked."
    yield section(f"{who}Curriculum", text, content)
    content = gap("curriculum.table in lineage.json")
    if rows(run.lineage, "curriculum", "table"):
        content = to_svg(sources_figure(run, languages), "Tokens and epochs by source")
    text = "As planned, the stages in order from dark to light; upright tick: served."
    yield section(f"{who}Tokens and epochs of each source", text, content)
    text = "Where the model comes from, oldest first."
    yield section(f"{who}Lineage", text, chain_html(run))


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write OUT/index.html for one run folder, or for several overlaid.

    Raises:
      UserError: a folder that holds no run, or a record that is damaged.
    """
    runs = [read_run(Path(f)) for f in folders]
    if not runs:
        raise UserError("report: there is no run folder: give at least one")
    languages = list(dict.fromkeys(k for r in runs for k in r.languages))
    trained = [r for r in runs if r.metrics]
    parts = []
    if len(runs) == 1:
        boxes = (
            f"<span>{esc(k)}</span><b>{esc(v)}</b>" for k, v in facts(runs[0]).items()
        )
        parts.append(f'<div class="cards"><div>{"</div><div>".join(boxes)}</div></div>')
    else:
        heads = list(dict.fromkeys(k for r in runs for k in facts(r)))
        body = [[r.name, *(facts(r).get(h, "–") for h in heads)] for r in runs]
        lines = ("<tr>" + "".join(td(esc(c)) for c in row) + "</tr>" for row in body)
        parts.append(html_table(["run", *heads], lines, []) + legend(runs))
    parts += [
        f'<p class="gap">{esc(r.name)}: unreadable lines of metrics.jsonl left out: '
        f"{r.unread} (a crash leaves an incomplete last line).</p>"
        for r in runs
        if r.unread
    ]
    parts += heldout_sections(runs, languages)
    if not sets_of(e for r in runs for e in r.evals):
        parts.append(section("Held-out evaluation", "", gap("evaluations in eval/")))
    if trained:
        parts += training_sections(trained, languages)
    else:
        parts.append(section("Training", "", gap("train lines in metrics.jsonl")))
    for run in runs:
        parts += origin_sections(run, of_run(run, runs), languages)
    title = esc(" and ".join(r.name for r in runs), 200)
    digest = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}: training report</title><style>{CSS}</style></head><body>"
        f"<h1>{title}</h1><p>Training report</p>{''.join(parts)}"
        f"<script>{SORT}</script></body></html>\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", page)
    return out / "index.html"
