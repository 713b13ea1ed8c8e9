"""Results on tasks as a page: tables and figures by language."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gamayun_jax.evaluate.paired import unpaired, verdicts
from gamayun_jax.report.figures import (
    axes,
    colours_of,
    horizontal,
    panels_figure,
    styled,
    to_svg,
)
from gamayun_jax.report.html import html_table, section, td
from gamayun_jax.report.read_run import (
    INK,
    Points,
    Run,
    cell,
    entries,
    error_text,
    esc,
    num,
    plain,
)

MARKS = (
    "The headline metric ± standard error (none where all items are alike), and below "
    "it the baseline that needs no model; green: better than that, significant at 5 % "
    "over all languages and tasks (Holm). In the figure: 95 %; dashed: chance; "
    "crosses: the baseline."
)


@styled
def task_figure(
    tasks: Mapping[str, Mapping[str, Any]], languages: Sequence[str]
) -> Any:
    """A panel per task: a dot per language, with chance and baseline."""
    names = list(tasks)
    height = 0.22 * len(languages) + 0.8
    across = min(len(names), 4)
    down = -(-len(names) // across)
    figure, grid = axes(9.5, height * down, down, across, sharey=True)
    for ax in grid[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(grid, names, strict=False):
        task = tasks[name]
        metric, found = task["metric"], task["languages"]
        chances = [row["chance"] for row in found.values() if "chance" in row]
        if chances:
            chance = sum(chances) / len(chances)
            ax.axvline(chance, color=INK, linestyle="--", linewidth=0.8, alpha=0.6)
        for i, language in enumerate(languages):
            row = found.get(language, {})
            if metric not in row:
                continue
            colour = colours_of(languages)[language]
            ends = unpaired(row[metric], row.get(f"{metric}_se"))
            if ends.low is not None and ends.high is not None:
                most = math.inf if task["kind"] == "perplexity" else 1.0
                ends_x = max(ends.low, 0.0), min(ends.high, most)
                ax.plot(ends_x, [i, i], color=colour)
            ax.plot(row[metric], i, "o", color=colour, markersize=5)
            if row.get("baseline") is not None:
                ax.plot(row["baseline"], i, "x", color=INK, markersize=4.5, alpha=0.75)
        ax.set_yticks(range(len(languages)), [plain(k, 14) for k in languages])
        ax.set_ylim(len(languages) - 0.4, -0.6)
        ax.set_title(f"{plain(name, 18)}, {metric}")
        horizontal(ax, 4, percent=task["kind"] != "perplexity")
    return figure


def beyond_baseline(tasks: Mapping[str, Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(task, language) of all results that are better than their baseline.

    The error of a share of right answers is at least that of the baseline's own share,
    and half an item is taken off (Yates): two of two right are not certain.
    """
    keys, found = [], []
    for name, task in tasks.items():
        metric, sign = task["metric"], -1 if task["kind"] == "perplexity" else 1
        for language, row in task["languages"].items():
            value, base = num(row, metric), num(row, "baseline")
            error = num(row, f"{metric}_se")
            if value is None or base is None:
                continue
            gain = sign * (value - base)
            if task["kind"] != "perplexity" and error is not None:
                items = max(num(row, "items") or 1, 1)
                error = max(error, math.sqrt(max(base * (1 - base), 0.0) / items))
                gain = math.copysign(max(abs(gain) - 0.5 / items, 0.0), gain)
            keys.append((name, language))
            found.append(unpaired(gain, error))
    marks = zip(keys, verdicts(found, [1] * len(found)), strict=True)
    return {key for key, verdict in marks if verdict == "better"}


def tasks_table(
    tasks: Mapping[str, Mapping[str, Any]], languages: Sequence[str]
) -> str:
    """Languages by tasks: the headline metric ± standard error, over the baseline."""
    lines = []
    better = beyond_baseline(tasks)
    for i, language in enumerate([*languages, "macro"]):
        cells = td(esc(language, 20), i)
        for name, task in tasks.items():
            row = task["languages"].get(language, {})
            row = task.get("macro", {}) if language == "macro" else row
            value, base = row.get(task["metric"]), row.get("baseline")
            text = cell(task, value) or "–"
            text += f"<small> {error_text(task, row)}</small>"
            text += "" if base is None else f"<br><small>{cell(task, base)}</small>"
            cells += td(text, value, "better" if (name, language) in better else "")
        lines.append(f"<tr>{cells}</tr>")
    return html_table(["language", *tasks], lines[:-1], lines[-1:])


def languages_in(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Languages of any of the tasks, in the order in which they appear."""
    found = (k for t in tasks.values() for k in [*t["languages"], *t.get("gaps", ())])
    return list(dict.fromkeys(found))


def tasks_section(
    tasks: Mapping[str, Mapping[str, Any]], languages: Sequence[str], title: str
) -> str:
    """A table and a figure of all tasks, and what was set aside."""
    notes = [
        f"{esc(name)}: {esc(task.get('description', '–'), 400)}"
        + (f"; {esc(task['shots'])} shots" if task.get("shots") else "")
        + (f"; no items: {esc(' '.join(task['gaps']))}" if task.get("gaps") else "")
        + "".join(
            f"; set aside, {esc(reason)}: {found['count']}"
            for reason, found in entries(task, "set_aside").items()
        )
        for name, task in tasks.items()
    ]
    notes_html = f"<ul><li>{'</li><li>'.join(notes)}</li></ul>"
    svg = to_svg(task_figure(tasks, languages), title)
    return section(title, MARKS, tasks_table(tasks, languages), svg, notes_html)


def task_points(run: Run, language: str, name: str) -> Points:
    """(tokens, headline metric) of a task at a run's evaluations."""
    found = []
    for e in run.evals:
        task = entries(e, "tasks").get(name)
        where = ("macro",) if language == "macro" else ("languages", language)
        if isinstance(task, dict):
            x, y = num(e, "tokens"), num(task, *where, str(task.get("metric")))
            if x is not None and y is not None:
                found.append((x, y))
    return found


def task_sections(runs: Sequence[Run], languages: Sequence[str]) -> Iterable[str]:
    """Curves of the tasks that ran during training, and each run's last results."""
    names = dict.fromkeys(n for r in runs for e in r.evals for n in entries(e, "tasks"))
    for name in names:
        shown = [k for k in languages if any(task_points(r, k, name) for r in runs)]
        if any(len(task_points(r, "macro", name)) > 1 for r in runs):
            figure = panels_figure(
                runs,
                ["macro", *shown],
                colours_of(languages),
                lambda run, key, name=name: task_points(run, key, name),
                "",
            )
            title = f"Task “{name}” over training"
            yield section(
                title, "Every panel has its own scale.", to_svg(figure, title)
            )
    for run in runs:
        last = [e for e in run.evals if entries(e, "tasks")][-1:]
        for e in last:
            who = f"{run.name}: " if len(runs) > 1 else ""
            found = {
                name: task
                for name, task in entries(e, "tasks").items()
                if {"kind", "metric", "languages"} <= set(entries(task))
            }
            title = f"{who}Tasks at the last evaluation"
            if found:
                yield tasks_section(found, languages_in(found), title)


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Plain text: a task's headline metric by language, with chance and baseline."""
    lines = []
    order = dict.fromkeys(k for task in tasks.values() for k in task["languages"])
    for name, task in tasks.items():
        metric, found = task["metric"], task["languages"]
        lines.append(f"{name}: {task['description']} ({metric} ± standard error)")
        lines.append(
            f"  {'':<7}{'':>17}{'chance':>9}{task['baseline']:>10}{'items':>8}"
        )
        rows = [(k, found[k]) for k in order if k in found]
        for language, row in [*rows, ("macro", task["macro"])]:
            if metric not in row:
                continue
            error = error_text(task, row).removesuffix(" %")
            line = f"  {language:<7}{cell(task, row[metric]):>8}"
            line += f"{' ' + error:<9}"
            line += "".join(
                f"{cell(task, row.get(k)):>9}" for k in ("chance", "baseline")
            )
            line += f"{row.get('items', ''):>9}"
            if row.get("parity") is not None:
                line += f"   parity {row['parity']:.2f}"
            if row.get("truncated"):
                line += f"   {row['truncated']} prompts cut"
            lines.append(line.rstrip())
        if task["gaps"]:
            lines.append(f"  no items: {' '.join(task['gaps'])}")
        for reason, items in task["set_aside"].items():
            shown = ", ".join(items["first"])
            lines.append(f"  set aside, {reason}: {items['count']} ({shown})")
        lines.append("")
    return "\n".join(lines).rstrip()
