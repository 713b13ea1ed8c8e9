"""A self-contained HTML report of one run, or of several overlaid, and its tables.

Everything comes from the run folders' records (see records.py); every text from them
is escaped, for names are data. Figures are inline SVG; nothing is loaded.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.records import write_atomic

COLOURS = (
    "#4269d0", "#e4572e", "#2a9d8f", "#b07aa1", "#e9a03b", "#6b8e23",
    "#c44e9a", "#7b5ea7", "#17a2b8", "#d1495b", "#8c6d46", "#5f7d95",
)  # fmt: skip
INK = "#12345a"  # replaced by the page's text colour, so that dark mode works
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """The records of one run folder."""

    name: str
    config: dict[str, Any]
    lineage: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]  # by step
    torn: bool  # the last metrics line is incomplete

    @property
    def languages(self) -> list[str]:
        return list(self.config.get("languages", []))

    @property
    def boundaries(self) -> list[float]:
        """Tokens at which a stage other than the first begins."""
        stages = self.lineage.get("stages", [])
        return [s["start_tokens"] for s in stages[1:]]

    def stage_evals(self) -> list[dict[str, Any]]:
        """The evaluations at the start and at the stages' ends; else all."""
        return [e for e in self.evals if e.get("label")] or self.evals


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
      UserError: no run folder, or a record that is not JSON.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} is no run folder (it has no config.json): give the --workdir of "
            "`gamayun train`"
        )

    def load(path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text("utf-8")) if path.exists() else {}
        except ValueError as e:
            raise UserError(f"{path} is damaged: {e}; restore or delete it") from e

    metrics, torn = [], False
    path = folder / "metrics.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            torn = True
            continue
        if record.get("kind") == "train":
            metrics.append(record)
    evals = [load(p) for p in (folder / "eval").glob("*.json")]
    return Run(
        name=folder.name,
        config=load(folder / "config.json"),
        lineage=load(folder / "lineage.json"),
        metrics=metrics,
        evals=sorted(evals, key=lambda e: e["step"]),
        torn=torn,
    )


# --- numbers and tables ---------------------------------------------------------


def short(value: float | None) -> str:
    """1234567 -> "1.23M"."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def columns_of(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    return [e.get("label") or f"step {e['step']}" for e in evals]


def language_table(evals: Sequence[Mapping[str, Any]]) -> str:
    """Plain-text bits per byte by language: one column an evaluation, and baselines."""
    lines = []
    for name in evals[0]["sets"]:
        heads = columns_of(evals)
        width = max(14, *(len(h) + 2 for h in heads))
        lines.append(f"bits per byte on held-out set {name!r} (± standard error)")
        lines.append(
            f"{'':<9}"
            + "".join(f"{h:>{width}}" for h in heads)
            + f"{'unigram':>9}{'xz -9e':>8}{'accuracy':>10}{'parity':>8}"
        )
        of_last = evals[-1]["sets"][name]
        rows = {**of_last["languages"]}
        for key in ("macro", "micro"):
            if key in of_last:
                rows[key] = of_last[key]
        for language, last in rows.items():
            line = f"{language:<9}"
            for e in evals:
                part = e["sets"].get(name, {})
                row = part.get("languages", {}).get(language) or part.get(language)
                cell = "–"
                if row:
                    cell = f"{row['bits_per_byte']:.3f} ±{row['bits_per_byte_se']:.3f}"
                line += f"{cell:>{width}}"
            base = last.get("baselines", {})
            for key, w in (("unigram", 9), ("xz", 8)):
                value = base.get(key)
                line += f"{value:>{w}.3f}" if value is not None else f"{'':>{w}}"
            line += f"{last['accuracy']:>10.1%}"
            parity = last.get("parity")
            line += f"{parity:>8.3f}" if parity is not None else ""
            lines.append(line)
        found = of_last["languages"].values()
        for key, label in (("unigram", "token unigram"), ("xz", "xz -9e")):
            under = sum(
                r["bits_per_byte"] < r["baselines"][key]
                for r in found
                if r["baselines"][key] is not None
            )
            lines.append(f"under {label}: {under} of {len(found)} languages")
        lines.append("")
    return "\n".join(lines).rstrip()


def run_table(folder: Path) -> str:
    """The per-language table of a run: before, and after each stage."""
    evals = read_run(folder).stage_evals()
    return language_table(evals) if evals else "no evaluation in this run"


def curriculum_table(rows: Sequence[Mapping[str, Any]], seq_len: int) -> str:
    """Plain-text table: share, tokens and epochs per stage and source."""
    lines = [
        f"{'stage':<12}{'source':<16}{'share':>8}{'tokens':>12}"
        f"{'epochs':>9}{'in all':>9}"
    ]
    former = None
    for r in rows:
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


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        for spine in ax.spines.values():
            spine.set_color(INK)
            spine.set_alpha(0.4)
        ax.tick_params(colors=INK, labelsize=9)
        ax.xaxis.label.set_color(INK)
        ax.yaxis.label.set_color(INK)
        ax.title.set_color(INK)
        ax.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Any) -> str:
    """Inline SVG, the same bytes for the same figure, in the page's text colour."""
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "gamayun", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("DejaVu Sans", "system-ui, sans-serif")


def token_axis(ax: Any, boundaries: Sequence[float] = ()) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) if x else "0"))
    ax.set_xlabel("tokens")
    for at in boundaries:
        ax.axvline(at, color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move label heights apart by at least `gap`, keeping their order and centre."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [values[i] for i in order]
    for _ in range(200):
        for a in range(len(placed) - 1):
            lack = gap - (placed[a + 1] - placed[a])
            if lack > 1e-12:
                placed[a] -= lack / 2
                placed[a + 1] += lack / 2
    result = [0.0] * len(values)
    for place, i in zip(placed, order, strict=True):
        result[i] = place
    return result


def label_ends(ax: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each line's name at its right end: (name, x, y, colour)."""
    if not ends:
        return
    low, high = ax.get_ylim()
    heights = spread([y for _, _, y, _ in ends], (high - low) * 0.045)
    right = max(x for _, x, _, _ in ends)
    for (name, _, _, colour), y in zip(ends, heights, strict=True):
        ax.annotate(
            name, (right, y), xytext=(6, 0), textcoords="offset points", color=colour,
            va="center", fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def colours(languages: Sequence[str]) -> dict[str, str]:
    return {k: COLOURS[i % len(COLOURS)] for i, k in enumerate(languages)}


def curriculum_figure(
    points: Sequence[Mapping[str, Any]],
    languages: Sequence[str] = (),
    boundaries: Sequence[float] = (),
) -> Any:
    """Shares of the sources over tokens, stacked; domains of a language are shades."""
    figure, axes = new_figure(9, 3.6)
    ax = axes[0, 0]
    sources = list(points[0]["shares"])
    languages = languages or list(dict.fromkeys(s.split("/")[0] for s in sources))
    sources.sort(key=lambda s: languages.index(s.split("/")[0]))
    of = colours(languages)
    x = [p["tokens"] for p in points]
    seen: dict[str, int] = {}
    shade = []
    for s in sources:
        language = s.split("/")[0]
        shade.append((of[language], 0.9 - 0.35 * min(seen.get(language, 0), 2)))
        seen[language] = seen.get(language, 0) + 1
    y = [[p["shares"].get(s, 0.0) for p in points] for s in sources]
    ax.stackplot(x, y, colors=shade, linewidth=0)
    ax.set_ylim(0, 1)
    ax.set_xlim(min(x), max(x))
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    ax.set_ylabel("share of tokens")
    total, ends = 0.0, []
    for s, values, (colour, _) in zip(sources, y, shade, strict=True):
        if values[-1] > 0:
            ends.append((s, max(x), total + values[-1] / 2, colour))
        total += values[-1]
    label_ends(ax, ends)
    token_axis(ax, boundaries)
    return figure


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Centred moving average over up to 2 * width + 1 values."""
    out = []
    for i in range(len(values)):
        part = values[max(0, i - width) : i + width + 1]
        out.append(sum(part) / len(part))
    return out


def loss_figure(runs: Sequence[Run]) -> Any:
    """Training loss per language over tokens: smoothed, the raw values faint."""
    figure, axes = new_figure(9, 4.6)
    ax = axes[0, 0]
    of = colours(runs[0].languages)
    ends = []
    for run, style in zip(runs, STYLES * len(runs), strict=False):
        for language in run.languages:
            pairs = [
                (m["tokens"], m["languages"][language]["nll"])
                for m in run.metrics
                if m["languages"].get(language, {}).get("nll") is not None
            ]
            if not pairs:
                continue
            x = [a for a, _ in pairs]
            y = [b for _, b in pairs]
            colour = of.get(language, INK)
            if len(runs) == 1:
                ax.plot(x, y, color=colour, alpha=0.18, linewidth=0.8)
            line = smooth(y, max(1, len(y) // 40))
            ax.plot(x, line, color=colour, linewidth=1.5, linestyle=style)
            if run is runs[0]:
                ends.append((language, x[-1], line[-1], colour))
    values = [line.get_ydata() for line in ax.get_lines()]
    if values:
        late = [v for ys in values for v in list(ys)[len(ys) // 20 :]]
        span = max(late) - min(late)
        ax.set_ylim(min(late) - 0.05 * span, max(late) + 0.05 * span)
    ax.set_ylabel("loss, nats per token")
    label_ends(ax, ends)
    token_axis(ax, runs[0].boundaries)
    return figure


def stage_figure(run: Run, name: str) -> Any:
    """Bits per byte before and after each stage, with baselines, by language."""
    evals = [e for e in run.stage_evals() if name in e["sets"]]
    languages = list(evals[-1]["sets"][name]["languages"])
    figure, axes = new_figure(9, 3.8)
    ax = axes[0, 0]
    markers = ("o", "s", "D", "^", "v")
    labels = columns_of(evals)
    for i, language in enumerate(languages):
        colour = colours(run.languages)[language]
        rows = [e["sets"][name]["languages"].get(language) for e in evals]
        ys = [r["bits_per_byte"] for r in rows if r]
        ax.plot([i] * len(ys), ys, color=colour, alpha=0.5, linewidth=1.2)
        for k, row in enumerate(rows):
            if row:
                ax.errorbar(
                    i, row["bits_per_byte"], yerr=2 * row["bits_per_byte_se"],
                    fmt=markers[k % 5], color=colour, markersize=6,
                    fillstyle="none" if k == 0 else "full", elinewidth=1,
                    alpha=0.55 if 0 < k < len(rows) - 1 else 1.0,
                    label=labels[k] if i == 0 else None,
                )  # fmt: skip
        base = evals[-1]["sets"][name]["languages"][language]["baselines"]
        for key, style in (("unigram", "--"), ("xz", "-")):
            if base.get(key) is not None:
                ax.hlines(
                    base[key], i - 0.3, i + 0.3, color=INK, linewidth=1.4,
                    linestyle=style, label=BASELINES[key] if i == 0 else None,
                )  # fmt: skip
    ax.set_xticks(range(len(languages)), languages)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("bits per byte")
    legend = ax.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False,
        fontsize=9, labelcolor=INK,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
    return figure


BASELINES = {"unigram": "token unigram", "xz": "xz -9e", "uniform": "uniform"}


def parity_figure(run: Run, names: Sequence[str]) -> Any:
    """Bits for the same content relative to English, at the last evaluation."""
    figure, axes = new_figure(9, 3.0, 1, len(names))
    for ax, name in zip(axes[0], names, strict=True):
        found = run.evals[-1]["sets"][name]["languages"]
        languages = [k for k, r in found.items() if r["parity"] is not None]
        values = [found[k]["parity"] for k in languages]
        ax.bar(languages, values, color=[colours(run.languages)[k] for k in languages])
        ax.axhline(1.0, color=INK, linewidth=1)
        ax.set_title(name, fontsize=10)
        ax.set_ylabel("bits per unit / English")
    return figure


def epochs_figure(run: Run) -> Any:
    """Tokens and epochs per source, by stage."""
    table = run.lineage["curriculum"]["table"]
    phases = list(dict.fromkeys(r["phase"] for r in table))
    sources = list(dict.fromkeys(r["source"] for r in table))
    figure, axes = new_figure(9, 0.28 * len(sources) + 1.2, 1, 2)
    for ax, key, label in (
        (axes[0, 0], "tokens", "tokens"),
        (axes[0, 1], "epochs", "epochs"),
    ):
        left = [0.0] * len(sources)
        for k, phase in enumerate(phases):
            values = {r["source"]: r[key] for r in table if r["phase"] == phase}
            width = [values.get(s, 0.0) for s in sources]
            ax.barh(
                sources, width, left=left, height=0.7, label=phase,
                color=COLOURS[k % len(COLOURS)], alpha=0.85,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, width, strict=True)]
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=INK, alpha=0.12)
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter(lambda v, _: short(v) if v else "0")
    axes[0, 1].set_yticklabels([])
    axes[0, 0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    return figure


def course_figure(runs: Sequence[Run]) -> Any:
    """Learning rate, gradient norm, throughput and waits over tokens."""
    figure, axes = new_figure(9, 4.6, 2, 2)
    panels = (
        (axes[0, 0], "learning rate", lambda m: m["lr"]),
        (axes[0, 1], "gradient norm", lambda m: m["grad_norm"]),
        (axes[1, 0], "tokens per second", lambda m: m["time"]["tokens_per_s"]),
        (
            axes[1, 1],
            "waiting for data, % of time",
            lambda m: 100 * m["time"].get("input_s", 0.0) / m["time"]["seconds"],
        ),
    )
    for ax, label, pick in panels:
        for run, style in zip(runs, STYLES * len(runs), strict=False):
            x = [m["tokens"] for m in run.metrics]
            y = [pick(m) if pick(m) is not None else math.nan for m in run.metrics]
            ax.plot(x, y, color=COLOURS[0], linewidth=1.4, linestyle=style)
        ax.set_title(label, fontsize=10, loc="left")
        if "rate" not in label:
            ax.set_ylim(bottom=0)
        if "second" in label:
            ax.yaxis.set_major_formatter(lambda v, _: short(v) if v else "0")
        token_axis(ax, runs[0].boundaries)
    return figure


def overlay_figure(runs: Sequence[Run], name: str) -> Any:
    """Macro bits per byte and English's over tokens, one line style per run."""
    figure, axes = new_figure(9, 3.4, 1, 2)
    for ax, pick, label in (
        (axes[0, 0], lambda s: s.get("macro"), "all languages (macro)"),
        (axes[0, 1], lambda s: s["languages"].get("en"), "English"),
    ):
        for run, style in zip(runs, STYLES * len(runs), strict=False):
            found = [
                (e["tokens"], pick(e["sets"][name])["bits_per_byte"])
                for e in run.evals
                if name in e["sets"] and pick(e["sets"][name])
            ]
            if found:
                ax.plot(
                    *zip(*found, strict=True), marker="o", markersize=4,
                    color=COLOURS[runs.index(run) % len(COLOURS)], linestyle=style,
                    label=run.name,
                )  # fmt: skip
        ax.set_title(label, fontsize=10, loc="left")
        ax.set_ylabel("bits per byte")
        token_axis(ax, runs[0].boundaries)
    axes[0, 0].legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


# --- page -----------------------------------------------------------------------


def esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first column is a row's name."""
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join(
        "<tr><th>" + "</th><td>".join([r[0], "</td><td>".join(r[1:])]) + "</td></tr>"
        for r in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def change(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> str:
    """A signed difference, marked when it is beyond two standard errors.

    The two evaluations score the same units, so this is conservative: pairing them
    would give smaller errors.
    """
    if not old:
        return ""
    delta = new["bits_per_byte"] - old["bits_per_byte"]
    error = math.hypot(new["bits_per_byte_se"], old["bits_per_byte_se"])
    kind = "same" if abs(delta) <= 2 * error else "better" if delta < 0 else "worse"
    return f' <span class="{kind}">{delta:+.3f}</span>'


def evaluation_table(run: Run, name: str) -> str:
    evals = [e for e in run.stage_evals() if name in e["sets"]]
    last = evals[-1]["sets"][name]
    rows = []
    keys = [*last["languages"], *(k for k in ("macro", "micro") if k in last)]
    for language in keys:
        cells = [esc(language)]
        former = None
        for e in evals:
            part = e["sets"][name]
            row = part["languages"].get(language) or part.get(language)
            if row:
                text = f"{row['bits_per_byte']:.3f}"
                text += f"<small> ±{row['bits_per_byte_se']:.3f}</small>"
                cells.append(text + change(row, former))
            else:
                cells.append("–")
            former = row
        row = last["languages"].get(language) or last[language]
        for key in ("uniform", "unigram", "xz"):
            value = row.get("baselines", {}).get(key)
            cells.append(f"{value:.3f}" if value is not None else "")
        cells.append(f"{row['accuracy']:.1%}")
        parity = row.get("parity")
        cells.append(f"{parity:.3f}" if parity is not None else "")
        rows.append(cells)
    head = ["", *map(esc, columns_of(evals)), "uniform", "unigram", "xz -9e"]
    return html_table([*head, "accuracy", "parity"], rows)


def overlay_table(runs: Sequence[Run], name: str) -> str:
    lasts = [r.evals[-1]["sets"].get(name) if r.evals else None for r in runs]
    first = lasts[0]
    assert first is not None
    rows = []
    for language in [*first["languages"], "macro"]:
        cells, reference = [esc(language)], None
        for part in lasts:
            row = part and (part["languages"].get(language) or part.get(language))
            if row:
                cells.append(f"{row['bits_per_byte']:.3f}{change(row, reference)}")
            else:
                cells.append("–")
            reference = reference or row
        rows.append(cells)
    return html_table(["", *(esc(r.name) for r in runs)], rows)


def facts(run: Run) -> list[tuple[str, str]]:
    time = sum(m["time"]["seconds"] for m in run.metrics)
    last = run.metrics[-1] if run.metrics else {}
    stages = run.lineage.get("stages", [])
    return [
        ("parameters", short(run.lineage.get("parameters"))),
        ("tokens", short(last.get("tokens"))),
        ("stages", " → ".join(s["name"] for s in stages) or "–"),
        ("languages", str(len(run.languages))),
        ("time", f"{time / 3600:.1f} h" if time > 5400 else f"{time / 60:.1f} min"),
        ("device", run.lineage.get("device", "–")),
    ]


def lineage_list(run: Run) -> str:
    """The chain of what led to the model, oldest first."""
    items = []
    chain, lineage = [], run.lineage
    while lineage:
        chain.append(lineage)
        lineage = (lineage.get("init_from") or {}).get("lineage") or {}
    for part in reversed(chain):
        corpus = part.get("corpus", {})
        origin = part.get("init_from")
        text = f"<b>{esc(part.get('run', '?'))}</b>, started {esc(part.get('started'))}"
        if origin:
            text += f", from {esc(origin.get('checkpoint'))}"
        text += (
            f"<br><small>corpus {esc(str(corpus.get('recipe', '–'))[:12])}, tokenizer "
            f"{esc(str(corpus.get('tokenizer', '–'))[:12])}; "
            + esc(", ".join(f"{k} {v}" for k, v in part.get("versions", {}).items()))
            + "</small>"
        )
        steps = [
            f"{esc(c['stage'])} step {c['step']} ({short(c['tokens'])}, "
            f"{esc(c['reason'])})"
            for c in part.get("checkpoints", [])
        ]
        shown = steps if len(steps) <= 8 else [*steps[:3], "…", *steps[-4:]]
        text += "<br>checkpoints: " + ("; ".join(shown) or "none")
        for e in part.get("events", []):
            text += f"<br>{esc(json.dumps(e, ensure_ascii=False))}"
        items.append(f"<li>{text}</li>")
    return f"<ol>{''.join(items)}</ol>"


CSS = """
:root{color-scheme:light dark;--fg:#1c2430;--bg:#fff;--soft:#5b6675;--line:#d9dee5;
--good:#12805c;--bad:#c2372e;--card:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--fg:#e4e8ee;--bg:#14181e;--soft:#9aa5b3;
--line:#303845;--good:#4cc79a;--bad:#ff7b6e;--card:#1d232c}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);
max-width:980px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.2rem;margin:2.4rem 0 .4rem}
p,small,li small{color:var(--soft)}p{margin:.3rem 0 .8rem}
svg{width:100%;height:auto}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}tbody th{text-align:left}thead th{color:var(--soft);font-weight:600}
.better{color:var(--good)}.worse{color:var(--bad)}.same{color:var(--soft)}
.facts{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.facts div{background:var(--card);border-radius:.5rem;padding:.5rem .9rem}
.facts b{display:block;font-size:1.15rem}.facts span{color:var(--soft);font-size:.8rem}
"""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write OUT/index.html for one run folder, or for several overlaid.

    Raises:
      UserError: a folder that holds no run.
    """
    runs = [read_run(Path(f)) for f in folders]
    main = runs[0]
    parts: list[str] = []

    def section(title: str, text: str, *content: str) -> None:
        parts.append(f"<h2>{esc(title)}</h2><p>{esc(text)}</p>{''.join(content)}")

    cards = "".join(
        f"<div><span>{esc(k)}</span><b>{esc(v)}</b></div>" for k, v in facts(main)
    )
    title = ", ".join(r.name for r in runs)
    if any(r.torn for r in runs):
        parts.append(
            "<p>The last line of metrics.jsonl is incomplete; it is left out.</p>"
        )
    sets = list(main.evals[-1]["sets"]) if main.evals else []
    for name in sets:
        if not main.evals[-1]["sets"][name]["languages"]:
            continue
        if len(runs) > 1:
            section(
                f"Runs side by side, held-out set “{name}”",
                "Bits per byte at each run's last evaluation; differences are to the "
                "first run, coloured beyond two standard errors.",
                overlay_table(runs, name),
                to_svg(overlay_figure(runs, name)),
            )
        section(
            f"Held-out set “{name}” by language",
            "Bits per byte ± standard error, with the change since the column before, "
            "coloured beyond two standard errors (lower is better). Parity: bits for "
            "the same content relative to English.",
            evaluation_table(main, name),
            to_svg(stage_figure(main, name)),
        )
    if not main.evals:
        section("Held-out evaluation", "This run has no evaluation yet.")
    curriculum = main.lineage.get("curriculum", {})
    if curriculum.get("shares"):
        section(
            "Curriculum",
            "Share of each source over tokens; dashed lines are stage boundaries.",
            to_svg(
                curriculum_figure(curriculum["shares"], main.languages, main.boundaries)
            ),
        )
    if main.metrics:
        section(
            "Training loss by language",
            "Nats per target token, smoothed; unweighted, so comparable across runs.",
            to_svg(loss_figure(runs)),
        )
    parallel = [n for n in sets if main.evals[-1]["sets"][n]["parallel"]]
    if parallel:
        section(
            "Bits for the same content, relative to English",
            "Parallel units: above 1 the model finds the same content harder to "
            "predict than in English.",
            to_svg(parity_figure(main, parallel)),
        )
    if curriculum.get("table"):
        section(
            "Tokens and epochs per source",
            "What the curriculum serves of each source, by stage.",
            to_svg(epochs_figure(main)),
        )
    if main.metrics:
        section(
            "Course of the run",
            "Time spent compiling, evaluating and saving is not in the throughput.",
            to_svg(course_figure(runs)),
        )
    section("Lineage", "Where the model comes from, oldest first.", lineage_list(main))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head><body>"
        f"<h1>{esc(title)}</h1>"
        f"<p>{esc(main.config.get('name', ''))}: training report</p>"
        f'<div class="facts">{cards}</div>{"".join(parts)}</body></html>\n'
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "index.html", page)
    return out / "index.html"
