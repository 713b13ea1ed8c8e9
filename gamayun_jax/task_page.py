"""Results on tasks as a page: tables and figures by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.figures import axes, colours_of, horizontal, styled, to_svg
from gamayun_jax.files import write_text
from gamayun_jax.page import html_page, html_table, section, td
from gamayun_jax.report import score_table
from gamayun_jax.run_tasks import cell
from gamayun_jax.runs import INK, esc, languages_of, plain, sets_of

MARKS = (
    "Dots: the headline metric, with two standard errors. Dashed: chance. Crosses: "
    "the baseline that needs no model."
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
            error = 2 * (row.get(f"{metric}_se") or 0.0)
            ax.errorbar(row[metric], i, xerr=error, fmt="o", color=colour, markersize=5)
            if row.get("baseline") is not None:
                ax.plot(row["baseline"], i, "x", color=INK, markersize=4.5, alpha=0.75)
        ax.set_yticks(range(len(languages)), [plain(k, 14) for k in languages])
        ax.set_ylim(len(languages) - 0.4, -0.6)
        ax.set_title(f"{plain(name, 18)}, {metric}")
        horizontal(ax, 4)
    return figure


def tasks_table(
    tasks: Mapping[str, Mapping[str, Any]], languages: Sequence[str]
) -> str:
    """Languages by tasks: the headline metric ± standard error, and the baseline."""
    heads = ["language"]
    for name in tasks:
        heads += [name, "baseline"]
    lines = []
    for i, language in enumerate([*languages, "macro"]):
        cells = td(esc(language, 20), i)
        for task in tasks.values():
            row = task["languages"].get(language, {})
            row = task["macro"] if language == "macro" else row
            value, base = row.get(task["metric"]), row.get("baseline")
            error = row.get(f"{task['metric']}_se")
            small = "" if error is None else f"<small> ±{cell(task, error)}</small>"
            better = (
                value is not None
                and base is not None
                and (value < base if task["kind"] == "perplexity" else value > base)
            )
            cells += td((cell(task, value) or "–") + small, value)
            cells += td(cell(task, base), base, "better" if better else "")
        lines.append(f"<tr>{cells}</tr>")
    return html_table(heads, lines[:-1], lines[-1:])


def languages_in(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Languages of any of the tasks, in the order in which they appear."""
    found = (k for t in tasks.values() for k in [*t["languages"], *t["gaps"]])
    return list(dict.fromkeys(found))


def tasks_section(
    tasks: Mapping[str, Mapping[str, Any]], languages: Sequence[str], title: str
) -> str:
    """A table and a figure of all tasks, and what was set aside."""
    notes = [
        f"{esc(name)}: {esc(task['description'])}"
        + (f"; {task['shots']} shots" if task["shots"] else "")
        + (f"; no items: {esc(' '.join(task['gaps']))}" if task["gaps"] else "")
        + "".join(
            f"; set aside, {esc(reason)}: {found['count']}"
            for reason, found in task["set_aside"].items()
        )
        for name, task in tasks.items()
    ]
    notes_html = f"<ul><li>{'</li><li>'.join(notes)}</li></ul>"
    svg = to_svg(task_figure(tasks, languages), title)
    return section(title, MARKS, tasks_table(tasks, languages), svg, notes_html)


def write_page(result: Mapping[str, Any], out: Path) -> Path:
    """OUT/index.html of an evaluation (see run_tasks.evaluate_model)."""
    parts = []
    if result.get("tasks"):
        tasks = result["tasks"]
        parts.append(tasks_section(tasks, languages_in(tasks), "Tasks by language"))
    for name in sets_of([result]):
        table = score_table(
            [("bits per byte", result, "", None)],
            name,
            languages_of([result], name),
            baselines=True,
        )
        parts.append(section(f"Held-out set “{name}”", "Lower is better.", table))
    model = result["model"]
    facts = {
        "model": f"{result['label']} ({model['parameters']:,} parameters)",
        "trained on": f"{result['tokens']:,} tokens" if result["tokens"] else "–",
        "computed by": " ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "date": result["date"],
    }
    rows = (f"<tr>{td(esc(k))}{td(esc(v, 300))}</tr>" for k, v in facts.items())
    parts.append(html_table(["", ""], rows, []))
    out.mkdir(parents=True, exist_ok=True)
    page = html_page(result["label"], "Evaluation", parts)
    write_text(out / "index.html", page)
    return out / "index.html"
