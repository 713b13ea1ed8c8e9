"""What a run was trained on: the ledger of its sources, and shares of its objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.data.ledger import (
    ledger_table,
    make_ledger,
    objective_table,
    uncounted,
)
from gamayun_jax.report.charts import Dot, Panel, dots_chart, percent
from gamayun_jax.report.curves import sources_chart
from gamayun_jax.report.formats import plain
from gamayun_jax.report.html import block, section
from gamayun_jax.report.read_run import Run, entries, get, num, rows

if TYPE_CHECKING:
    from markupsafe import Markup

Ledger = Mapping[str, Any]


def ledger_of(run: Run) -> dict[str, Any] | None:
    """The ledger of a run at its last record; None where its plan or its examples are
    not recorded."""
    seq_len = num(run.config, "data", "seq_len")
    table = rows(run.lineage, "curriculum", "table")
    if not table or not seq_len or seq_len < 1:
        return None
    size = int(seq_len)
    last = run.metrics[-1] if run.metrics else {}
    served = {
        name: int(num(row, "tokens") or 0) // size
        for name, row in entries(last, "sources").items()
    }
    return make_ledger(whole_lineage(run), size, served, whole_records(run))


def whole_lineage(run: Run) -> dict[str, Any]:
    """What a ledger takes of a run's lineage; what is no number is left out."""
    lineage, sources = run.lineage, {}
    for name, row in entries(lineage, "corpus", "sources").items():
        known = ("examples", "targets", "tokens", "documents")
        sources[name] = numbers(row, known)
        if not {"tokens", "documents"} <= sources[name].keys():
            sources[name].pop("documents", None)
    planned = {
        plain(stage): numbers(row, entries(row))
        for stage, row in entries(lineage, "curriculum", "objective").items()
    }
    origin = get(lineage, "init_from")
    return {
        "corpus": {"sources": sources},
        "curriculum": {
            "table": [
                {"source": plain(get(r, "source")), "tokens": 0}
                | numbers(r, ("tokens", "epochs"))
                for r in rows(lineage, "curriculum", "table")
            ],
            "objective": planned,
        },
        "transitions": {
            k: {"cursors": get(v, "cursors")}
            for k, v in entries(lineage, "transitions").items()
        },
        "init_from": {
            "cursors": numbers(get(origin, "cursors"), entries(origin, "cursors"))
        },
    }


def whole_records(run: Run) -> list[dict[str, Any]]:
    """What a ledger takes of a run's records of training."""
    return [
        {
            "stage": plain(get(m, "stage"), 16),
            "objective": numbers(get(m, "objective"), ("targets", "squared_weights")),
            "languages": {
                plain(k, 20): numbers(row, ("tokens", "targets", "weight"))
                for k, row in entries(m, "languages").items()
            },
        }
        for m in run.metrics
    ]


def numbers(data: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those of some entries that are finite numbers; whole ones as such."""
    found = {k: num(data, k) for k in names}
    return {k: int(x) if x == int(x) else x for k, x in found.items() if x is not None}


def gap(what: str) -> Markup:
    """Says which record is missing."""
    return block("gap", f"Not recorded in this run: {what}.")


def exposure_sections(run: Run, who: str, languages: Sequence[str]) -> Iterable[Markup]:
    """Sources as planned and served, and the objective's shares by stage."""
    ledger, content = ledger_of(run), []
    text = (
        "As planned, the stages in order from dark to light; upright tick: served. "
        "Below, planned and served are numbers of examples. Targets are tokens that "
        "are predicted: expected of a source (~), counted of a language. Repeats: "
        "share of the examples that were served before."
    )
    if rows(run.lineage, "curriculum", "table"):
        content.append(sources_chart("Tokens and epochs by source", run, languages))
    else:
        content.append(gap("curriculum.table in lineage.json"))
    if ledger is not None:
        content.append(block("table", ledger_table(ledger)))
        if run.metrics and (note := uncounted_note(ledger)):
            content.append(block("gap", note))
    yield section(f"{who}Tokens and epochs of each source", text, *content)
    stages = [s for s in (ledger or {}).get("stages", []) if s["targets"]]
    if stages:
        yield section(
            f"{who}Share of the objective",
            "Of the sum of the targets' weights in the loss, by language. Bar: "
            "achieved; upright tick: planned, by the mixture that a stage comes to and "
            "its token weights. Effective: Kish's effective sample size, (sum of "
            "weights)² / sum of their squares, as a share of the targets; 100 % where "
            "all weigh the same.",
            objective_chart(stages, languages),
            block("table", objective_table(stages)),
        )


def objective_chart(
    stages: Sequence[Mapping[str, Any]], languages: Sequence[str]
) -> Markup:
    """A panel per stage: achieved share, and a tick for the planned one."""
    panels, names = [], list(dict.fromkeys(k for s in stages for k in s["languages"]))
    for stage in stages:
        dots = {}
        for name, row in stage["languages"].items():
            share, planned = row["achieved"] or 0.0, row["planned"]
            dots[name] = [Dot(share, "bar", 0.0, share, name="achieved")]
            dots[name] += (
                [Dot(planned, "tick", name="planned")] if planned is not None else []
            )
        panels.append(Panel(stage["stage"], dots, form=percent, ticks=5))
    return dots_chart("Share of the objective by language", panels, names, languages)


def uncounted_note(ledger: Ledger) -> str:
    """What the records count otherwise than the plan served, in a sentence; "" if
    nothing."""
    told = [f"{k} {b or 0:,} of {a:,}" for k, (a, b) in uncounted(ledger).items()]
    more = f" and {len(told) - 3} more languages" if told[3:] else ""
    return (
        f"The records of training count fewer or more tokens than the plan served: "
        f"{', '.join(told[:3])}{more}. Lines of metrics.jsonl are missing."
        if told
        else ""
    )


def exposure_text(run: Run) -> str:
    """The same as plain text; "" where it is not recorded."""
    ledger = ledger_of(run)
    if ledger is None or not run.metrics:
        return ""
    parts = [f"what was served, at step {plain(get(run.metrics[-1], 'step'))}"]
    parts.append(ledger_table(ledger).text())
    stages = [s for s in ledger["stages"] if s["targets"]]
    if stages:
        parts += ["", "share of the objective"]
        parts += [objective_table([stage]).text() for stage in stages]
    note = uncounted_note(ledger)
    return "\n".join([*parts, note] if note else parts)
