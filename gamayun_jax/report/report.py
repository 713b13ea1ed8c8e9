"""A self-contained HTML report of one run, or of several overlaid, and text tables.

All of it comes from the run folders' records (records.py). Every field is optional:
what is missing leaves a labelled gap.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.data.files import write_text
from gamayun_jax.evaluate.paired import RULE
from gamayun_jax.report.figures import (
    colours_of,
    course_figure,
    curriculum_figure,
    loss_figure,
    loss_points,
    panels_figure,
    quantised_figure,
    sources_figure,
    stage_figure,
    to_svg,
)
from gamayun_jax.report.html import html_page, html_table, section, td
from gamayun_jax.report.read_run import (
    BASELINES,
    SVG_DASHES,
    Points,
    Run,
    beaten,
    entries,
    esc,
    fixed,
    get,
    label_of,
    languages_of,
    num,
    plain,
    read_quantised,
    read_run,
    rows,
    score,
    seconds_of,
    sets_of,
    short,
    spans,
)
from gamayun_jax.report.stage_changes import (
    Change,
    change_td,
    items_of,
    set_changes,
    stage_sections,
)
from gamayun_jax.report.task_page import task_sections

# Heading, evaluation, heading of its change, changes by language (None: no column).
Column = tuple[str, Any, str, Mapping[str, Change] | None]


def score_table(
    columns: Sequence[Column],
    name: str,
    languages: Sequence[str],
    baselines: bool,
) -> str:
    """Bits per byte by language.

    Args:
      baselines: add the last evaluation's baselines, accuracy and parity.
    """
    tested = languages_of((e for _, e, _, _ in columns), name)
    shown = [k for k in languages if k in tested]
    heads = ["language"]
    for head, _, versus, changes in columns:
        heads += [head] if changes is None else [head, versus]
    parts = []
    for i, language in enumerate((*shown, "macro", "micro")):
        mean = i >= len(shown)
        dot = (
            f'<i style="background:var(--c{languages.index(language) % 12})"></i>'
            if (not mean)
            else ""
        )
        cells = td(dot + esc(language, 20), i)
        for _, e, _, changes in columns:
            last = score(e, name, language)
            value, error = num(last, "bits_per_byte"), num(last, "bits_per_byte_se")
            small = "" if error is None else f"<small> ±{error:.3f}</small>"
            cells += td(fixed(value) + small, value)
            if changes is not None:
                delta = changes.get(language)
                cells += change_td(delta) if delta else td("–")
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
    used = sorted(x for m in run.metrics if (x := num(m, "time", "mfu")) is not None)
    if used:
        found["MFU (median)"] = f"{used[len(used) // 2]:.1%}"
    wall, productive = num(run.goodput, "wall"), num(run.goodput, "productive")
    if wall and productive is not None:
        found["goodput"] = f"{productive / wall:.0%}"
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


STAGE_LEGEND = (
    '<p class="legend"><span>○ before</span><span>● faint: after a stage</span>'
    "<span>● at the end</span><span>| xz -9e</span><span>× token unigram</span>"
    "<span>— 95 %</span></p>"
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
            columns: list[Column] = [(runs[0].name, ends[0], "", None)]
            for r, e in zip(runs[1:], ends[1:], strict=True):
                items = items_of(runs[0], ends[0]), items_of(r, e)
                found = set_changes(name, ends[0], e, *items)
                columns.append((r.name, e, f"− {runs[0].name}", found))
            text = f"Bits per byte at the last evaluation (lower is better). {RULE}"
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
        columns = [(label_of(evals[0]), evals[0], "", None)]
        for old, new in itertools.pairwise(evals):
            items = items_of(run, old), items_of(run, new)
            found = set_changes(name, old, new, *items)
            columns.append((label_of(new), new, "change", found))
        won = "; ".join(beaten(evals[-1], name, k) for k in ("unigram", "xz"))
        text = (
            f"Bits per byte ± standard error (lower is better). {RULE} A baseline "
            f"above the model's number is green; {won}. Parity: bits for the same "
            "content, relative to English. Click a heading to sort."
        )
        yield section(
            f"{of_run(run, runs)}Held-out set “{name}” by language",
            text,
            score_table(columns, name, languages, baselines=True),
            to_svg(
                stage_figure(run, name, languages, columns[-1][3] or {}),
                f"Results on {name}",
            ),
            STAGE_LEGEND,
        )


def quantised_sections(
    records: Sequence[dict[str, Any]], languages: Sequence[str]
) -> Iterable[str]:
    """A section per model and held-out set: its floats, and each quantisation.

    Args:
      records: of `gamayun quantize`, and "folder", where each is.
    """
    models: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for record in records:
        if len(rows(record, "evals")) == 2:
            models.setdefault((get(record, "run"), get(record, "step")), []).append(
                record
            )
    for (run, step), found in models.items():
        found.sort(key=lambda r: -(num(r, "bits") or 0))
        first = rows(found[0], "evals")[0]
        evals = [first, *(rows(r, "evals")[1] for r in found)]
        sizes = [num(found[0], "bytes", "before")]
        sizes += [num(r, "bytes", "after") for r in found]
        weights = ", ".join(
            f"{esc(label_of(e))} {short(size)}B"
            for e, size in zip(evals, sizes, strict=True)
        )
        for name in sets_of(evals):
            columns: list[Column] = [(label_of(first), first, "", None)]
            for record, e in zip(found, evals[1:], strict=True):
                items = Path(record["folder"]) / "items"
                ends = items / "before", items / str(get(e, "label"))
                changes = set_changes(name, first, e, *ends)
                columns.append((label_of(e), e, "change", changes))
            text = (
                f"Bits per byte of step {esc(step)} before and after its weights were "
                f"quantised. Weights: {weights}. {RULE}"
            )
            svg = to_svg(
                quantised_figure(evals, name, languages), f"Quantised, on {name}"
            )
            table = score_table(columns, name, languages, baselines=False)
            title = f"Quantised weights of {plain(run, 30)}, “{name}”"
            yield section(title, text, table, svg)


def of_run(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def time_section(runs: Sequence[Run]) -> str:
    """A table of what the runs' wall time went to."""
    names = list(dict.fromkeys(k for r in runs for k in r.goodput))
    lines = []
    for run in runs:
        wall = num(run.goodput, "wall")
        cells = td(esc(run.name))
        for name in names:
            value = num(run.goodput, name)
            text = "–" if value is None else f"{value:,.1f} s"
            if value is not None and wall and name != "wall":
                text += f"<small> {value / wall:.1%}</small>"
            cells += td(text, value)
        stalls = [num(m, "time", "stalled_steps") for m in run.metrics]
        stalled = sum(x or 0 for x in stalls)
        cells += td("–" if not stalls else f"{stalled:,.0f}", stalled)
        lines.append(f"<tr>{cells}</tr>")
    table = html_table(["run", *names, "stalled steps"], lines, [])
    text = (
        "Wall time since the run began. Productive: its steps. Interrupted: away, or "
        "making steps again. Stalled steps: before them the device had nothing to do, "
        "for want of data."
    )
    return section("Where the time went", text, table)


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

    Folders of `gamayun quantize` among them get a section: before and after.

    Raises:
      UserError: a folder that holds no run, or a record that is damaged.
    """
    quantised = {f: read_quantised(Path(f)) for f in folders}
    of_runs = [Path(f) for f, record in quantised.items() if record is None]
    runs = [read_run(folder) for folder in of_runs]
    records = [{**r, "folder": f} for f, r in quantised.items() if r is not None]
    if not runs:
        raise UserError("report: there is no run folder: give at least one")
    languages = list(dict.fromkeys(k for r in runs for k in r.languages if k != "und"))
    languages += [
        k
        for r in records
        for name in sets_of(rows(r, "evals"))
        for k in languages_of(rows(r, "evals"), name)
        if k not in languages
    ]
    languages = list(dict.fromkeys(languages))
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
        f"{len(r.unread)}, number {', '.join(map(str, r.unread[:5]))} (a crash leaves "
        "an incomplete last line).</p>"
        for r in runs
        if r.unread
    ]
    for run in runs:
        parts += stage_sections(run, languages, of_run(run, runs))
    parts += heldout_sections(runs, languages)
    if not sets_of(e for r in runs for e in r.evals):
        parts.append(section("Held-out evaluation", "", gap("evaluations in eval/")))
    parts += quantised_sections(records, languages)
    parts += task_sections(runs, languages)
    if trained:
        parts += training_sections(trained, languages)
        if any(r.goodput for r in trained):
            parts.append(time_section(trained))
    else:
        parts.append(section("Training", "", gap("train lines in metrics.jsonl")))
    for run in runs:
        parts += origin_sections(run, of_run(run, runs), languages)
    page = html_page(" and ".join(r.name for r in runs), "Training report", parts)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.html", page)
    return out / "index.html"
