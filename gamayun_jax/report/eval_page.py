"""The page that `gamayun eval --out` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gamayun_jax.report.formats import plain
from gamayun_jax.report.html import block, section, write_page
from gamayun_jax.report.read_run import BASELINES, Evaluation, languages_of, sets_of
from gamayun_jax.report.scores import Column, score_chart, score_table
from gamayun_jax.report.task_scores import languages_in, tasks_section

if TYPE_CHECKING:
    from markupsafe import Markup


def eval_parts(result: Mapping[str, Any]) -> Iterable[Markup]:
    """The page of an evaluation (see stored_model.evaluate_model)."""
    if tasks := result.get("tasks"):
        yield tasks_section(tasks, languages_in(tasks), "Tasks by language")
    for name in sets_of([result]):
        languages, column = languages_of([result], name), Column("bits/byte", result)
        table = score_table([column], name, languages, tuple(BASELINES))
        text = "Bits per byte ± standard error; lower is better."
        title = f"Held-out set “{name}”"
        chart = score_chart(title, [Evaluation(result)], name, languages, {})
        legend = block("legend", ("● the model", "| xz -9e", "× token unigram"))
        yield section(title, text, block("table", table), chart, legend)
    model = result["model"]
    versions = " ".join(f"{k} {v}" for k, v in result["versions"].items())
    facts = [
        f"model: {plain(result['label'])} ({model['parameters']:,} parameters)",
        f"trained on: {result['tokens']:,} tokens" if result["tokens"] else "",
        f"window: {result['window']} tokens" if result.get("window") else "",
        f"computed by: {plain(versions, 300)}",
        f"date: {plain(result['date'])}",
    ]
    yield block("notes", list(filter(None, facts)))


def write_eval_page(result: Mapping[str, Any], out: Path) -> Path:
    """OUT/index.html of an evaluation."""
    return write_page(out, result["label"], "Evaluation", eval_parts(result))
