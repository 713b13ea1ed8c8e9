"""Models side by side, by language and task, with paired confidence intervals.

Two models answer the same items, so what they differ by is told from the items'
differences (paired.py): far narrower than two separate errors. A mark stands where the
difference is significant at 5 % over all tasks and languages of a model, for among a
hundred cells of nothing five would else be marked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.config import UserError
from gamayun_jax.data.files import write_json, write_text
from gamayun_jax.evaluate.paired import (
    LEVEL,
    MACRO,
    RULE,
    Cell,
    cells,
    verdicts,
)
from gamayun_jax.report.figures import axes, colours_of, horizontal, styled, to_svg
from gamayun_jax.report.html import html_page, html_table, section, td
from gamayun_jax.report.read_run import INK, PAPER, cell, error_text, esc, plain
from gamayun_jax.report.stage_changes import interval_text, item_differences

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def compare_rows(
    name: str, task: Mapping[str, Any], a: Sequence[Any], b: Sequence[Any]
) -> dict[str, Cell]:
    """Language (and macro) -> how b differs from a on a task's headline metric.

    No macro where one has languages that the other lacks: the means are of others.

    Raises:
      UserError: texts of the same ids that are not of the same bytes.
    """
    old, new = by_language(a), by_language(b)
    metric = task["metric"]
    pairs = {k: item_differences(old[k], new[k], metric) for k in old if k in new}
    for k, pair in pairs.items():
        lost = old[k].keys() & new[k].keys() - pair.keys()
        if lost and task["metric"] == "bits_per_byte":
            raise UserError(
                f"{name}: the {k} text {min(lost)!r} was not the same for all models: "
                "evaluate them again with the same corpus"
            )
    found = cells(pairs, task["parallel"])
    if found.keys() - {MACRO} != old.keys() | new.keys():
        found.pop(MACRO, None)
    return found


def by_language(rows: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Language -> id -> row."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["language"], {})[str(row["id"])] = row
    return found


def compare(results: Sequence[tuple[Mapping[str, Any], Rows]]) -> dict[str, Any]:
    """compare.json: the models, and for each task and language their values and how
    each differs from the first.

    Raises:
      UserError: fewer than two, or no task that all have answered in the same way.
    """
    if len(results) < 2:
        raise UserError("compare: give at least two models or result folders")
    results = with_labels(results)
    first, base = results[0]
    names = [n for n in first["tasks"] if all(n in r["tasks"] for r, _ in results)]

    def version(result: Mapping[str, Any], name: str) -> tuple[str, str]:
        task = result["tasks"][name]
        return task["hash"], task["prompt_hash"]

    other = [n for n in names if len({version(r, n) for r, _ in results}) > 1]
    if other:
        raise UserError(
            f"the task {other[0]!r} was not the same for all models (other items or "
            "prompts): evaluate them again with the same version"
        )
    if not names:
        raise UserError(
            "the models have no task in common: evaluate them on the same tasks or "
            "held-out sets"
        )
    # For each model after the first: task -> language -> cell.
    found: list[dict[str, dict[str, Cell]]] = [
        {n: compare_rows(n, first["tasks"][n], base[n], rows[n]) for n in names}
        for _, rows in results[1:]
    ]
    told = [told_of(first["tasks"], of_model) for of_model in found]
    tasks: dict[str, Any] = {}
    for name in names:
        task = first["tasks"][name]
        keys = ("kind", "metric", "description", "parallel", "hash", "baseline")
        tasks[name] = {
            **{k: task[k] for k in keys},
            "values": [
                {**r["tasks"][name]["languages"], MACRO: r["tasks"][name]["macro"]}
                for r, _ in results
            ],
            "differences": [{}, *(of_model[name] for of_model in told)],
        }
    return {
        "format": 2,
        "models": [
            {**r["model"], "label": r["label"], "window": r.get("window")}
            for r, _ in results
        ],
        "level": LEVEL,
        "tasks": tasks,
    }


def with_labels(
    results: Sequence[tuple[Mapping[str, Any], Rows]],
) -> list[tuple[dict[str, Any], Rows]]:
    """Results with a label each: the same name twice would be one column."""
    labels: list[str] = []
    for result, _ in results:
        label, n = result["label"], 2
        while label in labels:
            label, n = f"{result['label']} ({n})", n + 1
        labels.append(label)
    return [
        ({**result, "label": label}, rows)
        for (result, rows), label in zip(results, labels, strict=True)
    ]


def told_of(
    tasks: Mapping[str, Any], found: Mapping[str, Mapping[str, Cell]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """A model's cells as compare.json tells them: with gain (above 0 is better) and
    verdict (better, worse, same)."""
    keys = [(name, k) for name, row in found.items() for k in row]
    rows = [found[name][k] for name, k in keys]
    signs = [-1 if tasks[n]["kind"] == "perplexity" else 1 for n, _ in keys]
    told: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in found}
    marks = verdicts(rows, signs)
    for (name, k), row, sign, verdict in zip(keys, rows, signs, marks, strict=True):
        told[name][k] = {
            **dataclasses.asdict(row),
            "gain": sign * row.difference,
            "verdict": verdict,
        }
    return told


def languages_in(task: Mapping[str, Any]) -> list[str]:
    """Languages with a value of any model, macro last."""
    found = (k for v in task["values"] for k in v if k != MACRO)
    return [*dict.fromkeys(found), MACRO]


def signed(task: Mapping[str, Any], value: float) -> str:
    text = cell(task, abs(value)).removesuffix(" %")
    return f"{'−' if value < 0 else '+'}{text}"


def comparison_text(found: Mapping[str, Any]) -> str:
    """Plain text: a table per task; * marks significant differences to the first."""
    labels = [m["label"] for m in found["models"]]
    lines = []
    for name, task in found["tasks"].items():
        unit = "bits per byte, lower is better" if task["kind"] == "perplexity" else "%"
        lines.append(f"{name}: {task['metric']} ({unit}); * differs from {labels[0]}")
        heads = "".join(f"{plain(label, 20):>22}" for label in labels)
        lines.append(f"  {'':<7}{heads}")
        for language in languages_in(task):
            line = f"  {language:<7}"
            for values, gaps in zip(task["values"], task["differences"], strict=True):
                value = values.get(language, {}).get(task["metric"])
                text = cell(task, value).removesuffix(" %") or "–"
                if (d := gaps.get(language)) is not None:
                    star = " " if d["verdict"] == "same" else "*"
                    text += f" ({signed(task, d['difference'])}){star}"
                line += f"{text:>22}"
            lines.append(line.rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


@styled
def difference_figure(
    task: Mapping[str, Any], labels: Sequence[str], languages: Sequence[str]
) -> Any:
    """A panel per model after the first: differences with 95 % intervals."""
    gaps = task["differences"][1:]
    colours = colours_of(k for k in languages if k != MACRO)
    height = 0.24 * len(languages) + 0.8
    shape = {"sharey": True, "sharex": True}
    figure, grid = axes(9.5, height, 1, len(gaps), **shape)
    for ax, label, by in zip(grid, labels[1:], gaps, strict=True):
        ax.axvline(0, color=INK, alpha=0.6, linewidth=0.8)
        for i, language in enumerate(languages):
            if (d := by.get(language)) is None:
                continue
            colour = colours.get(language, INK)
            if d["low"] is not None:
                ax.plot([d["low"], d["high"]], [i, i], color=colour)
            face = PAPER if d["verdict"] == "same" else colour
            look = {"color": colour, "markerfacecolor": face, "markersize": 5}
            ax.plot(d["difference"], i, "o", **look)
        ax.set_yticks(range(len(languages)), [plain(k, 14) for k in languages])
        ax.set_ylim(len(languages) - 0.4, -0.6)
        ax.set_title(f"{plain(label, 24)} − {plain(labels[0], 24)}")
        horizontal(ax, 5, percent=task["kind"] != "perplexity")
    return figure


def task_section(name: str, task: Mapping[str, Any], labels: Sequence[str]) -> str:
    """A task's table and figure."""
    languages = languages_in(task)
    heads = ["language", labels[0]]
    for label in labels[1:]:
        heads += [label, "difference", "95 %"]
    body = []
    for i, language in enumerate(languages):
        row_html = td(esc(language, 20), i)
        for values, gaps in zip(task["values"], task["differences"], strict=True):
            row = values.get(language, {})
            value = row.get(task["metric"])
            small = f"<small> {error_text(task, row)}</small>"
            row_html += td((cell(task, value) or "–") + small, value)
            if gaps is task["differences"][0]:
                continue
            d = gaps.get(language)
            if d is None:
                row_html += td("–") + td("")
                continue
            row_html += td(signed(task, d["difference"]), d["difference"], d["verdict"])
            ends = Cell(*(d[f.name] for f in dataclasses.fields(Cell)))
            scale, digits = (1, 3) if task["kind"] == "perplexity" else (100, 1)
            text = interval_text(ends, scale, digits)
            row_html += td(f"<small>{text}</small>", d["low"])
        body.append(f"<tr>{row_html}</tr>")
    low = task["kind"] == "perplexity"
    text = (
        f"{esc(task['description'], 400)}: {esc(task['metric'])}"
        f"{', lower is better' if low else ''}. In the figure: filled dots for colours."
    )
    svg = to_svg(difference_figure(task, labels, languages), f"Differences on {name}")
    return section(name, text, html_table(heads, body[:-1], body[-1:]), svg)


def write_comparison(found: Mapping[str, Any], out: Path) -> Path:
    """OUT/compare.json and OUT/index.html."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", found)
    labels = [m["label"] for m in found["models"]]
    facts = [
        f"<tr>{td(esc(m['label']))}{td(format(m['parameters'], ','), m['parameters'])}"
        f"{td(esc(m['path'], 200))}{td(esc(str(m['tokenizer'])[:12]))}"
        f"{td(esc(m['window'] or 'default'), m['window'])}</tr>"
        for m in found["models"]
    ]
    heads = ["model", "parameters", "path", "tokenizer", "window"]
    note = (
        f"{RULE} Green: better than {esc(labels[0])}, red: worse. Bits per byte "
        "compare across tokenizers; perplexities would not."
    )
    parts = [section("Models", note, html_table(heads, facts, []))]
    parts += [task_section(n, t, labels) for n, t in found["tasks"].items()]
    write_text(out / "index.html", html_page(" · ".join(labels), "Comparison", parts))
    return out / "index.html"
