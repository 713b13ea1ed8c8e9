"""`gamayun compare`: models side by side, by language and task.

Every model is compared with the first one, by the rule of changes.py. A mark stands
where a difference is significant at 5 % over all tasks and languages of a model, for
among a hundred cells of nothing five would else be marked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.config import UserError
from gamayun_jax.data.files import write_json
from gamayun_jax.evaluate.paired import LEVEL, MACRO
from gamayun_jax.report.changes import (
    BITS,
    Change,
    changes_between,
    item_differences,
)
from gamayun_jax.report.charts import Panel, dots_chart, percent
from gamayun_jax.report.colours import language_cell
from gamayun_jax.report.formats import error_text, metric_name, metric_text, plain
from gamayun_jax.report.html import GLOSSARY, block, section, write_page
from gamayun_jax.report.read_run import Evaluation
from gamayun_jax.tables import Cell, Table

if TYPE_CHECKING:
    from markupsafe import Markup

# eval.json, and the items of each task (see evaluate/results.py).
Result = tuple[Mapping[str, Any], Mapping[str, Sequence[dict[str, Any]]]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models' results on the tasks that they share, and how they differ.

    Args:
      models: as compare.json tells them.
      tasks: name -> the first model's summary.
      results: of each model, name -> its summary of the task.
      changes: of each model after the first, name -> language -> its change from that.
    """

    models: Sequence[Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]
    changes: Sequence[Mapping[str, Mapping[str, Change]]]

    @property
    def labels(self) -> list[str]:
        return [m["label"] for m in self.models]

    def languages(self, name: str) -> list[str]:
        """Languages with a value of any model, macro last."""
        known = (k for result in self.results for k in result[name]["languages"])
        return [*dict.fromkeys(known), MACRO]

    def value(self, model: int, name: str, language: str) -> Mapping[str, Any]:
        """A model's results on a task in a language, or on the mean of languages."""
        task = self.results[model][name]
        return task[MACRO] if language == MACRO else task["languages"].get(language, {})


def compare(results: Sequence[Result]) -> Comparison:
    """Each model's results and how they differ from the first's.

    Raises:
      UserError: fewer than two, or no task that all have answered in the same way.
    """
    if len(results) < 2:
        raise UserError("compare: give at least two models or result folders")
    first = results[0][0]["tasks"]
    names = [n for n in first if all(n in r["tasks"] for r, _ in results)]
    for name in names:
        tasks = [r["tasks"][name] for r, _ in results]
        if len({(t["hash"], t["prompt_hash"]) for t in tasks}) > 1:
            raise UserError(
                f"the task {name!r} was not the same for all models (other items or "
                "prompts): evaluate them again with the same version"
            )
    if not names:
        raise UserError(
            "the models have no task in common: evaluate them on the same tasks or "
            "held-out sets"
        )
    evals = [
        Evaluation(
            {"tasks": {n: r["tasks"][n] for n in names}},
            items={n: items[n] for n in names},
        )
        for r, items in results
    ]
    changes: list[dict[str, dict[str, Change]]] = []
    for e in evals[1:]:
        changes.append({name: {} for name in names})
        check_texts(evals[0], e)
        for change in changes_between(evals[0], e, least_shared=0.0):
            changes[-1][change.test][change.language] = change
    labels = unique_labels([r["label"] for r, _ in results])
    models = [
        {**r["model"], "label": label, "window": r.get("window")}
        for (r, _), label in zip(results, labels, strict=True)
    ]
    return Comparison(models, evals[0]["tasks"], [e["tasks"] for e in evals], changes)


def check_texts(a: Evaluation, b: Evaluation) -> None:
    """Refuse texts of the same ids that are not of the same bytes."""
    for name, task in a["tasks"].items():
        if task["metric"] != BITS:
            continue
        old, new = a.items_of(name)[0], b.items_of(name)[0]
        for k in (k for k in old if k in new):
            pair = item_differences(old[k], new[k], BITS)
            if lost := old[k].keys() & new[k].keys() - pair.keys():
                raise UserError(
                    f"{name}: the {k} text {min(lost)!r} was not the same for all "
                    "models: evaluate them again with the same corpus"
                )


def unique_labels(labels: Sequence[str]) -> list[str]:
    """Labels with a number where one stands twice."""
    unique: list[str] = []
    for label in labels:
        name, n = label, 2
        while name in unique:
            name, n = f"{label} ({n})", n + 1
        unique.append(name)
    return unique


def to_json(c: Comparison) -> dict[str, Any]:
    """compare.json: gains above 0 are better; a verdict is better, worse or same."""
    tasks = {}
    for name, task in c.tasks.items():
        keys = ("kind", "metric", "description", "parallel", "hash", "baseline")
        results = [result[name] for result in c.results]
        differences: list[dict[str, Any]] = [{}]
        for of_model in c.changes:
            differences.append({})
            for k, change in of_model[name].items():
                e = dataclasses.asdict(change.estimate)
                difference = e.pop("value")
                differences[-1][k] = {
                    "difference": difference, **e, "gain": change.sign * difference,
                    "verdict": change.verdict,
                }  # fmt: skip
        tasks[name] = {
            **{k: task[k] for k in keys},
            "values": [{**r["languages"], MACRO: r[MACRO]} for r in results],
            "differences": differences,
        }
    return {"format": 2, "models": c.models, "level": LEVEL, "tasks": tasks}


def task_table(c: Comparison, name: str) -> Table:
    """Languages by models: the headline metric, and how it differs from the first's."""
    task, labels = c.tasks[name], [plain(label, 20) for label in c.labels]
    heads = ["language", labels[0]]
    for label in labels[1:]:
        heads += [label, "difference"]
    rows = []
    for i, language in enumerate(c.languages(name)):
        row = [language_cell(i, language, language == MACRO)]
        for n in range(len(labels)):
            result = c.value(n, name, language)
            value = result.get(task["metric"])
            text = metric_text(task, value) or "–"
            row.append(Cell(text, error_text(task, result), value=value))
            if n:
                change = c.changes[n - 1][name].get(language)
                row.append(change.cell() if change else Cell())
        rows.append(row)
    return Table(heads, rows[:-1], rows[-1:])


def comparison_text(c: Comparison) -> str:
    """Plain text: a table per task; + and - mark significant differences."""
    parts = []
    for name, task in c.tasks.items():
        unit = "lower is better" if task["metric"] == BITS else "%"
        first = plain(c.labels[0], 20)
        parts += [
            f"{name}: {metric_name(task['metric'])}, {unit}; differences from {first}: "
            "+ better, - worse, beyond noise",
            task_table(c, name).text(notes=False, marks=True),
            "",
        ]
    return "\n".join(parts).rstrip()


def task_section(c: Comparison, name: str) -> Markup:
    """A task's table, and a figure with a panel per model after the first."""
    task, labels = c.tasks[name], [plain(label, 24) for label in c.labels]
    languages = c.languages(name)
    panels = [
        Panel(
            f"{label} − {labels[0]}",
            {k: [change.dot()] for k, change in of_model[name].items()},
            form=None if task["kind"] == "perplexity" else percent,
        )
        for label, of_model in zip(labels[1:], c.changes, strict=True)
    ]
    low = "; lower is better" if task["metric"] == BITS else ""
    metric = metric_name(task["metric"])
    text = f"{plain(task['description'], 300)}: {metric}{low}."
    known = [k for k in languages if k != MACRO]
    svg = dots_chart(f"Differences on {name}", panels, languages, known, shared=True)
    return section(name, text, block("table", task_table(c, name)), svg)


def comparison_parts(c: Comparison) -> Iterable[Markup]:
    """The page of a comparison: the models, and a section for each task."""
    facts = [
        [
            m["label"], Cell(f"{m['parameters']:,}", value=m["parameters"]),
            plain(m["path"], 200), str(m["tokenizer"])[:12],
            Cell(plain(m["window"] or "default"), value=m["window"]),
        ]
        for m in c.models
    ]  # fmt: skip
    heads = ["model", "parameters", "path", "tokenizer", "window"]
    note = (
        f"Green ✓: better than {plain(c.labels[0])}, red ✗: worse, grey ≈: noise; in "
        "figures the latter are faint."
    )
    table = block("table", Table(heads, facts))
    yield section("Models", note, table, block("glossary", GLOSSARY))
    for name in c.tasks:
        yield task_section(c, name)


def write_comparison(c: Comparison, out: Path) -> Path:
    """OUT/compare.json and OUT/index.html."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", to_json(c))
    return write_page(out, " · ".join(c.labels), "Comparison", comparison_parts(c))
