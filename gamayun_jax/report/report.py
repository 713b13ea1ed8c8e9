"""A self-contained HTML report of one run, or of several overlaid.

All of it comes from the run folders' records (training/run_folder.py). Every field is
optional: what is missing leaves a labelled gap.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.config import AnyPath, UserError
from gamayun_jax.data.files import write_json
from gamayun_jax.evaluate.paired import MACRO
from gamayun_jax.report.changes import BITS, Change, stage_sections
from gamayun_jax.report.charts import DASHES, Panel, Points, dots_chart
from gamayun_jax.report.curves import (
    course_chart,
    loss_points,
    losses,
    panels_chart,
)
from gamayun_jax.report.exposure import gap, ledger_of
from gamayun_jax.report.forgetting import forgetting_section
from gamayun_jax.report.formats import fixed, plain, short
from gamayun_jax.report.html import GLOSSARY, block, section, write_page
from gamayun_jax.report.provenance import curriculum_sections, lineage_section
from gamayun_jax.report.read_run import (
    BASELINES,
    Evaluation,
    Run,
    beaten,
    entries,
    get,
    label_of,
    languages_of,
    num,
    read_quantised,
    read_run,
    rows,
    score,
    seconds_of,
    sets_of,
)
from gamayun_jax.report.scores import Column, score_chart, score_table, set_changes
from gamayun_jax.report.story import sample_sections, summary_section, switch_section
from gamayun_jax.report.task_scores import task_sections
from gamayun_jax.storage import as_path
from gamayun_jax.tables import Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup

SCORE_LEGEND = (
    "○ before", "● faint: after a stage", "● at the end", "| xz -9e",
    "× token unigram", "— 95 %",
)  # fmt: skip
COURSE = (
    ("learning rate", "tokens", "lr"),
    ("gradient norm", "tokens", "grad_norm"),
    ("tokens per second", "time", "time", "tokens_per_s"),
    ("waiting for data, % of the time", "time", "time", "data_wait_s"),
)


def facts(run: Run) -> dict[str, str]:
    """The headline numbers."""
    last = run.metrics[-1] if run.metrics else {}
    rates = sorted(num(m, "time", "tokens_per_s") or 0.0 for m in run.metrics)
    time = seconds_of(run)
    told = {
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
        told["MFU (median)"] = f"{used[len(used) // 2]:.1%}"
    wall, productive = num(run.goodput, "wall"), num(run.goodput, "productive")
    if wall and productive is not None:
        told["goodput"] = f"{productive / wall:.0%}"
    for name in sets_of(run.evals):
        values = [num(score(e, name, MACRO), BITS) for e in run.evals]
        ends = f"{fixed(values[0], '.2f')} → {fixed(values[-1], '.2f')}"
        told[f"bits per byte, {plain(name, 20)}"] = ends
    return told


def line_styles(runs: Sequence[Run]) -> list[Markup]:
    """The legend of the runs' line styles; none for a single run."""
    names = [(r.name, d) for r, d in zip(runs, itertools.cycle(DASHES))]
    return [block("line_styles", names)] if len(runs) > 1 else []


def of_run(run: Run, runs: Sequence[Run]) -> str:
    """The beginning of a heading: which of several runs."""
    return f"{run.name}: " if len(runs) > 1 else ""


def bpb_points(run: Run, language: str, name: str) -> Points:
    """(tokens, bits per byte) of a held-out set at a run's evaluations."""
    points = [
        (num(e, "tokens"), num(score(e, name, language), BITS)) for e in run.evals
    ]
    return [(x, y) for x, y in points if x is not None and y is not None]


def comparison_section(
    runs: Sequence[Run], name: str, languages: Sequence[str]
) -> Markup:
    """The last evaluations of several runs on a held-out set, against the first's."""
    tested = [[e for e in r.evals if languages_of([e], name)][-1:] for r in runs]
    first, *others = [e[0] if e else Evaluation({}) for e in tested]
    columns = [Column(runs[0].name, first)]
    for run, e in zip(runs[1:], others, strict=True):
        changes = set_changes(name, first, e)
        columns.append(Column(run.name, e, f"− {runs[0].name}", changes))
    text = "Bits per byte at the last evaluation; lower is better."
    table = block("table", score_table(columns, name, languages))
    return section(f"Runs compared on “{name}”", text, table)


def over_training_section(
    runs: Sequence[Run], name: str, languages: Sequence[str]
) -> Markup:
    """Bits per byte on a held-out set at all evaluations."""
    tested = languages_of((e for r in runs for e in r.evals), name)
    keys = [MACRO, *(k for k in languages if k in tested)]
    points_of = functools.partial(bpb_points, name=name)
    title = f"Bits per byte over training, “{name}”"
    text = "Every panel has its own scale; the steep start is cut off."
    svg = panels_chart(title, runs, keys, languages, points_of, "bits per byte")
    return section(title, text, *line_styles(runs), svg)


def set_section(run: Run, name: str, languages: Sequence[str], who: str) -> Markup:
    """A held-out set before training and after each stage, with baselines."""
    evals = run.tests(name)
    columns = [Column(label_of(evals[0]), evals[0])]
    changes: Mapping[str, Change] = {}
    for old, new in itertools.pairwise(evals):
        changes = set_changes(name, old, new)
        # Of many stages the changes stand with them alone: the table has to fit a page.
        shown = changes if len(evals) < 4 else None
        columns.append(Column(label_of(new), new, "change", shown))
    kept = entries(evals[-1], "ema", "sets", name)
    told = " “average”: of the parameters over time, and its change." if kept else ""
    won = "; ".join(beaten(evals[-1], name, k) for k in ("unigram", "xz"))
    return section(
        f"{who}Held-out set “{name}” by language",
        "Bits per byte ± standard error; lower is better. A baseline above the model's "
        f"number is green ✓; {won}.{told} The changes' intervals stand with the "
        "stages above.",
        block("table", score_table(columns, name, languages, tuple(BASELINES), False)),
        score_chart(f"Results on {name}", evals, name, languages, changes),
        block("legend", SCORE_LEGEND),
    )


def heldout_sections(runs: Sequence[Run], languages: Sequence[str]) -> Iterable[Markup]:
    """Runs compared, their course and each run's results, by held-out set."""
    for name in sets_of(e for r in runs for e in r.evals):
        if len(runs) > 1:
            yield comparison_section(runs, name, languages)
        if len(runs) > 1 or any(len(r.evals) > len(r.stage_evals) for r in runs):
            yield over_training_section(runs, name, languages)
    for run in runs:
        for name in sets_of(run.evals):
            if run.tests(name):
                yield set_section(run, name, languages, of_run(run, runs))


def quantised_sections(
    records: Mapping[Path, Mapping[str, Any]], languages: Sequence[str]
) -> Iterable[Markup]:
    """A section per model and held-out set: its floats, and each quantisation.

    Args:
      records: of `gamayun quantize`, by their folders.
    """
    models: dict[tuple[Any, Any], list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder, record in records.items():
        if len(rows(record, "evals")) == 2:
            model = get(record, "run"), get(record, "step")
            models.setdefault(model, []).append((folder, record))
    for (run, step), of_model in models.items():
        of_model.sort(key=lambda pair: -(num(pair[1], "bits") or 0))
        pairs, sizes = [], []
        for folder, record in of_model:
            before, after = (
                Evaluation(e, folder / "items" / plain(get(e, "label")))
                for e in rows(record, "evals")
            )
            pairs.append((before, after))
            sizes.append(f"{label_of(after)} {short(num(record, 'bytes', 'after'))}B")
        first = pairs[0][0]
        whole = short(num(of_model[0][1], "bytes", "before"))
        for name in sets_of(e for pair in pairs for e in pair):
            columns, panels = [Column(label_of(first), first)], []
            for before, after in pairs:
                changes = set_changes(name, before, after)
                columns.append(Column(label_of(after), after, "change", changes))
                dots = {k: [c.dot()] for k, c in changes.items()}
                panels.append(Panel(f"bits per byte added by {label_of(after)}", dots))
            text = (
                f"Bits per byte of step {plain(step)} before and after its weights "
                f"were quantised. Weights: {label_of(first)} {whole}B, "
                f"{', '.join(sizes)}."
            )
            tested = languages_of([first], name)
            shown = [*(k for k in languages if k in tested), MACRO]
            svg = dots_chart(f"Quantised, on {name}", panels, shown, languages)
            table = block("table", score_table(columns, name, languages))
            title = f"Quantised weights of {plain(run, 30)}, “{name}”"
            yield section(title, text, table, svg)


def time_table(runs: Sequence[Run]) -> Table:
    """What the runs' wall time went to."""
    names = list(dict.fromkeys(k for r in runs for k in r.goodput))
    body = []
    for run in runs:
        wall = num(run.goodput, "wall")
        row = [Cell(run.name)]
        for name in names:
            value, share = num(run.goodput, name), ""
            if value is not None and wall and name != "wall":
                share = f"{value / wall:.1%}"
            text = "–" if value is None else f"{value:,.1f} s"
            row.append(Cell(text, share, value=value))
        stalls = [num(m, "time", "stalled_steps") for m in run.metrics]
        stalled = sum(x or 0 for x in stalls)
        row.append(Cell(f"{stalled:,.0f}" if stalls else "–", value=stalled))
        body.append(row)
    return Table(["run", *names, "stalled steps"], body)


def loss_sections(runs: Sequence[Run], languages: Sequence[str]) -> Iterable[Markup]:
    """Training loss by language, of runs with records of training."""
    if not runs:
        yield section("Training", "", gap("train lines in metrics.jsonl"))
        return
    made = [losses(run) for run in runs]
    unit = made[0][1] if len({unit for _, unit in made}) == 1 else ""
    points = {
        (run.folder, key): loss_points(run, key, of=of)
        for run, (of, _) in zip(runs, made, strict=True)
        for key in (MACRO, *languages)
    }

    def raw(run: Run, key: str) -> Points:
        return points[run.folder, key][0]

    def smooth(run: Run, key: str) -> Points:
        return points[run.folder, key][1]

    shown = [k for k in (MACRO, *languages) if any(smooth(r, k) for r in runs)]
    title = "Training loss by language"
    svg = panels_chart(
        title, runs, shown, languages, smooth, unit,
        faint_of=raw if len(runs) == 1 else None,
    )  # fmt: skip
    told = "" if unit else " Runs without their sources' bytes are in nats per token."
    text = (
        f"{unit or 'Bits per byte'}, unweighted, smoothed; each panel has its own "
        f"scale, the steep start is cut off; “macro”: the mean over languages.{told} "
        "Across a stage's start only held-out sets compare: the texts change, too."
    )
    yield section(title, text[0].upper() + text[1:], *line_styles(runs), svg)


def course_sections(runs: Sequence[Run]) -> Iterable[Markup]:
    """Rates and where the time went, of runs with records of training."""
    if not runs:
        return
    text = "Compiling, evaluating and saving do not count in the throughput."
    small = [course_chart(runs, *course) for course in COURSE]
    yield section("Course", text, *line_styles(runs), block("grid", small))
    if any(r.goodput for r in runs):
        text = "Wall time since the run began."
        yield section("Where the time went", text, block("table", time_table(runs)))


def head_parts(runs: Sequence[Run]) -> Iterable[Markup]:
    """The headline numbers, and what of the records could not be read."""
    of_runs = [facts(r) for r in runs]
    if len(runs) == 1:
        yield block("cards", of_runs[0])
    else:
        heads = list(dict.fromkeys(k for told in of_runs for k in told))
        body = [
            [run.name, *(told.get(h, "–") for h in heads)]
            for run, told in zip(runs, of_runs, strict=True)
        ]
        yield block("table", Table(["run", *heads], body))
        yield from line_styles(runs)
    for run in runs:
        if run.unread:
            yield block(
                "gap",
                f"{run.name}: unreadable lines of metrics.jsonl left out: "
                f"{len(run.unread)}, number {', '.join(map(str, run.unread[:5]))} (a "
                "crash leaves an incomplete last line).",
            )
    yield block("glossary", GLOSSARY)


def languages_shown(runs: Sequence[Run], quantised: Iterable[Any]) -> list[str]:
    """All languages of a page."""
    known = [k for r in runs for k in r.languages if k != "und"]
    for record in quantised:
        evals = rows(record, "evals")
        known += [k for name in sets_of(evals) for k in languages_of(evals, name)]
    return list(dict.fromkeys(known))


def write_report(folders: Sequence[AnyPath], out: AnyPath) -> Path:
    """Write OUT/index.html for one run folder, or for several overlaid; and beside it
    exposure.json, run -> its ledger (data/ledger.py).

    Folders of `gamayun quantize` among them get a section: before and after.

    Raises:
      UserError: a folder that holds no run, or a record that is damaged.
    """
    out, records = as_path(out), {as_path(f): read_quantised(f) for f in folders}
    runs = [read_run(folder) for folder, record in records.items() if record is None]
    quantised = {f: record for f, record in records.items() if record is not None}
    if not runs:
        raise UserError("report: there is no run folder: give at least one")
    languages = languages_shown(runs, quantised.values())
    trained = [r for r in runs if r.metrics]
    parts = list(head_parts(runs))
    for run in runs:
        parts += summary_section(run, of_run(run, runs))
    for run in runs:
        parts += curriculum_sections(run, of_run(run, runs), languages)
    parts += loss_sections(trained, languages)
    for run in runs:
        parts += stage_sections(run, languages, of_run(run, runs))
    parts += switch_section(runs)
    parts += heldout_sections(runs, languages)
    if not sets_of(e for r in runs for e in r.evals):
        parts.append(section("Held-out evaluation", "", gap("evaluations in eval/")))
    parts += quantised_sections(quantised, languages)
    parts += task_sections(runs, languages)
    for run in runs:
        parts += forgetting_section(run, of_run(run, runs), languages)
    parts += sample_sections(runs, [of_run(run, runs) for run in runs])
    parts += course_sections(trained)
    for run in runs:
        parts.append(lineage_section(run, of_run(run, runs)))
    title = " and ".join(r.name for r in runs)
    page = write_page(out, title, "Training report", parts)
    ledgers = {r.name: ledger for r in runs if (ledger := ledger_of(r))}
    write_json(out / "exposure.json", ledgers)
    return page
