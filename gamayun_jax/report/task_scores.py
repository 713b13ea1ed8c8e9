"""Results on tasks: a table for the terminal, tables and figures for pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.evaluate.paired import MACRO, above_baseline, unpaired, verdicts
from gamayun_jax.report.changes import BITS
from gamayun_jax.report.charts import Dot, Panel, Points, dots_chart, percent
from gamayun_jax.report.colours import language_cell
from gamayun_jax.report.curves import panels_chart
from gamayun_jax.report.formats import error_text, metric_name, metric_text, plain
from gamayun_jax.report.html import block, section
from gamayun_jax.report.read_run import Run, averaged, entries, num
from gamayun_jax.tables import Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup

Tasks = Mapping[str, Mapping[str, Any]]
MARKS = (
    "The headline metric ± standard error (none where all items are alike), and below "
    "it the baseline that needs no model; green ✓: better, significant at 5 % "
    "over all languages and tasks (Holm). In the figure: 95 %; dashed: chance; "
    "crosses: the baseline."
)


def task_text(tasks: Tasks) -> str:
    """Plain text: a task's headline metric by language, with chance and baseline."""
    parts = []
    order = dict.fromkeys(k for task in tasks.values() for k in task["languages"])
    for name, task in tasks.items():
        metric, languages = task["metric"], task["languages"]
        known = [(k, languages[k]) for k in order if k in languages]
        rows = []
        for language, row in [*known, (MACRO, task[MACRO])]:
            if metric not in row:
                continue
            cells = [metric_text(task, row.get(k)) for k in ("chance", "baseline")]
            error = error_text(task, row).removesuffix(" %")
            value = Cell(metric_text(task, row[metric]), error)
            parity = "" if row.get("parity") is None else f"{row['parity']:.2f}"
            bits = row.get("answer_bits_per_byte")
            cells += [
                "" if bits is None else f"{bits:.3f}",
                str(row.get("items", "")),
                parity,
                str(row.get("truncated") or ""),
            ]
            rows.append([language, value, *cells])
        heads = [
            "language",
            metric_name(metric),
            "chance",
            task["baseline"],
            "right, bits/byte",
        ]
        heads += ["items", "parity"]
        table = Table([*heads, "prompts cut"], rows).without_empty_columns()
        parts += [f"{name}: {task['description']}", table.text()]
        if task["gaps"]:
            parts.append(f"no items: {' '.join(task['gaps'])}")
        for reason, items in task["set_aside"].items():
            shown = ", ".join(items["first"])
            parts.append(f"set aside, {reason}: {items['count']} ({shown})")
        parts.append("")
    return "\n".join(parts).rstrip()


def task_panel(name: str, task: Mapping[str, Any]) -> Panel:
    """A dot per language with its 95 % interval, and the baseline."""
    metric, of_language = task["metric"], task["languages"]
    chances = [row["chance"] for row in of_language.values() if "chance" in row]
    most = math.inf if task["kind"] == "perplexity" else 1.0
    dots: dict[str, list[Dot]] = {}
    for language, row in of_language.items():
        if metric not in row:
            continue
        e = unpaired(row[metric], row.get(f"{metric}_se"))
        low = None if e.low is None else max(e.low, 0.0)
        high = None if e.high is None else min(e.high, most)
        dots[language] = [Dot(row[metric], "solid", low, high, name=metric)]
        if row.get("baseline") is not None:
            dots[language].append(Dot(row["baseline"], "cross", name="baseline"))
    return Panel(
        f"{plain(name, 18)}, {metric_name(metric)}",
        dots,
        line=sum(chances) / len(chances) if chances else None,
        dashed=True,
        form=None if task["kind"] == "perplexity" else percent,
    )


def beyond_baseline(tasks: Tasks) -> set[tuple[str, str]]:
    """(task, language) of all results that are better than their baseline."""
    keys, gains = [], []
    for name, task in tasks.items():
        metric = task["metric"]
        for language, row in task["languages"].items():
            value, base = num(row, metric), num(row, "baseline")
            error = num(row, f"{metric}_se")
            if value is None or base is None:
                continue
            keys.append((name, language))
            if task["kind"] == "perplexity":
                gains.append(unpaired(base - value, error))
            else:
                items = max(num(row, "items") or 1, 1)
                gains.append(above_baseline(value, error, base, items))
    marks = zip(keys, verdicts(gains, [1] * len(gains)), strict=True)
    return {key for key, verdict in marks if verdict == "better"}


def tasks_table(
    tasks: Tasks, languages: Sequence[str], averages: Mapping[str, Any] | None
) -> Table:
    """Languages by tasks: the headline metric ± standard error, over the baseline, and
    that of the average of the parameters (`averages`: its tasks) where there is one."""
    better = beyond_baseline(tasks)

    def row_of(i: int, language: str) -> list[Cell]:
        row = [language_cell(i, language, language == MACRO)]
        for name, task in tasks.items():
            where = (MACRO,) if language == MACRO else ("languages", language)
            result = entries(task, *where)
            value, base = result.get(task["metric"]), result.get("baseline")
            average = metric_text(task, num(averages, name, *where, task["metric"]))
            small = (metric_text(task, base), average and f"average {average}")
            verdict = "better" if (name, language) in better else ""
            row.append(
                Cell(
                    metric_text(task, value) or "–",
                    error_text(task, result),
                    ", ".join(filter(None, small)),
                    value,
                    verdict,
                )
            )
        return row

    rows = [row_of(i, k) for i, k in enumerate([*languages, MACRO])]
    return Table(["language", *tasks], rows[:-1], rows[-1:])


def languages_in(tasks: Tasks) -> list[str]:
    """Languages of any of the tasks, in the order in which they appear."""
    known = (k for t in tasks.values() for k in [*t["languages"], *t.get("gaps", ())])
    return list(dict.fromkeys(known))


def tasks_section(
    tasks: Tasks,
    languages: Sequence[str],
    title: str,
    averages: Mapping[str, Any] | None = None,
) -> Markup:
    """A table and a figure of all tasks, and what was set aside.

    Args:
      averages: the tasks of the average of the parameters, shown in small print.
    """
    notes = []
    for name, task in tasks.items():
        note = [f"{plain(name)}: {plain(task.get('description', '–'), 200)}"]
        if task.get("shots"):
            note.append(f"{plain(task['shots'])} shots")
        if task.get("gaps"):
            note.append(f"no items: {plain(' '.join(task['gaps']))}")
        for reason, items in entries(task, "set_aside").items():
            note.append(f"set aside, {plain(reason)}: {items['count']}")
        notes.append("; ".join(note))
    panels = [task_panel(name, task) for name, task in tasks.items()]
    svg = dots_chart(title, panels, languages, languages)
    table = block("table", tasks_table(tasks, languages, averages))
    text = f"{MARKS} “average”: of the parameters." if averages else MARKS
    return section(title, text, table, svg, block("notes", notes))


def task_points(run: Run, language: str, name: str) -> Points:
    """(tokens, headline metric) of a task at a run's evaluations."""
    points = []
    for e in run.evals:
        task = entries(e, "tasks").get(name)
        where = (MACRO,) if language == MACRO else ("languages", language)
        if isinstance(task, dict):
            x, y = num(e, "tokens"), num(task, *where, str(task.get("metric")))
            if x is not None and y is not None:
                points.append((x, y))
    return points


def metric_of(runs: Sequence[Run], name: str) -> str:
    """The headline metric of a task, as the last evaluation of it says."""
    told = [entries(e, "tasks", name).get("metric") for r in runs for e in r.evals]
    return str(([*filter(None, told)] or [""])[-1])


def task_sections(runs: Sequence[Run], languages: Sequence[str]) -> Iterable[Markup]:
    """Curves of the tasks that ran during training, and each run's last results."""
    names = dict.fromkeys(n for r in runs for e in r.evals for n in entries(e, "tasks"))
    for name in names:
        points_of = functools.partial(task_points, name=name)
        shown = [k for k in languages if any(points_of(r, k) for r in runs)]
        if any(len(points_of(r, MACRO)) > 1 for r in runs):
            title, keys = f"Task “{name}” over training", [MACRO, *shown]
            svg = panels_chart(
                title, runs, keys, languages, points_of, cut=False, alike=True,
                form=None if metric_of(runs, name) == BITS else percent,
            )  # fmt: skip
            metric = metric_name(metric_of(runs, name))
            text = f"{metric}; all panels have one scale, from 0."
            yield section(title, text, svg)
    for run in runs:
        for e in [e for e in run.evals if entries(e, "tasks")][-1:]:
            who = f"{run.name}: " if len(runs) > 1 else ""
            whole = {
                name: task
                for name, task in entries(e, "tasks").items()
                if {"kind", "metric", "languages"} <= set(entries(task))
            }
            title = f"{who}Tasks at the last evaluation"
            if whole:
                averages = entries(averaged(e), "tasks")
                yield tasks_section(whole, languages_in(whole), title, averages)
