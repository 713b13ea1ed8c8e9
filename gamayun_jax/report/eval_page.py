"""The page that `gamayun eval --out` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.data.files import write_text
from gamayun_jax.report.html import html_page, section
from gamayun_jax.report.read_run import esc, languages_of, sets_of
from gamayun_jax.report.report import score_table
from gamayun_jax.report.task_page import languages_in, tasks_section


def write_page(result: Mapping[str, Any], out: Path) -> Path:
    """OUT/index.html of an evaluation (see stored_model.evaluate_model)."""
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
        "window": f"{result['window']} tokens" if result.get("window") else "default",
        "computed by": " ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "date": result["date"],
    }
    lines = (f"<li>{esc(k)}: {esc(v, 400)}</li>" for k, v in facts.items())
    parts.append(f"<ul>{''.join(lines)}</ul>")
    out.mkdir(parents=True, exist_ok=True)
    page = html_page(result["label"], "Evaluation", parts)
    write_text(out / "index.html", page)
    return out / "index.html"
