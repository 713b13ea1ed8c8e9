"""What a run was trained on, and the chain of runs that it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gamayun_jax.report.curves import curriculum_chart
from gamayun_jax.report.exposure import exposure_sections, gap
from gamayun_jax.report.formats import plain, short
from gamayun_jax.report.html import block, section
from gamayun_jax.report.read_run import Run, entries, get, num, rows, spans
from gamayun_jax.tables import Table

if TYPE_CHECKING:
    from markupsafe import Markup


def origin_text(part: Mapping[str, Any]) -> str:
    """From which checkpoint a run began; "" if from none."""
    if origin := entries(part, "init_from"):
        kept = ("checkpoint", "step", "tokens", "restarted")
        return "; ".join(f"{k}: {get(origin, k)}" for k in kept if get(origin, k))
    parents = get(part, "parents")
    return str(parents) if parents else ""


def stages_of(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's stages as the page shows them, each with its checkpoints."""
    stages = []
    for name, begin, end in spans(rows(part, "stages")):
        saved = [
            f"step {plain(get(c, 'step'))}, {short(num(c, 'tokens'))}, "
            f"{plain(get(c, 'reason') or '–')}"
            for c in rows(part, "checkpoints")
            if plain(get(c, "stage"), 16) == name
        ]
        saved = saved if len(saved) < 6 else [*saved[:2], "…", *saved[-2:]]
        ends = {"begin": short(begin), "end": short(end)}
        stages.append({"name": name, "checkpoints": saved, **ends})
    return stages


def chain_of(run: Run) -> list[dict[str, Any]]:
    """The runs that led to the model as the page shows them, oldest first."""
    chain: list[dict[str, Any]] = []
    part = run.lineage
    while part and len(chain) < 50:
        sources = entries(part, "corpus", "sources").values()
        versions = ", ".join(f"{k} {v}" for k, v in entries(part, "versions").items())
        events = [
            "; ".join(f"{plain(k)}: {plain(v, 120)}" for k, v in event.items())
            for event in rows(part, "events")
        ]
        chain.append(
            {
                "origin": plain(origin_text(part), 300),
                "name": plain(get(part, "run") or "–"),
                "started": plain(get(part, "started") or "–"),
                "device": plain(get(part, "device") or "–"),
                "recipe": plain(get(part, "corpus", "recipe") or "–")[:12],
                "tokenizer": plain(get(part, "corpus", "tokenizer") or "–")[:12],
                "sources": len(sources),
                "tokens": short(sum(num(s, "tokens") or 0.0 for s in sources)),
                "versions": plain(versions or "versions not recorded", 300),
                "stages": stages_of(part),
                "events": events[-200:],
                "event_count": len(events),
            }
        )
        part = entries(part, "init_from", "lineage")
    return chain[::-1]


def curriculum_sections(
    run: Run, who: str, languages: Sequence[str]
) -> Iterable[Markup]:
    """What a run was trained on."""
    content = gap("curriculum.shares in lineage.json")
    if rows(run.lineage, "curriculum", "shares"):
        content = curriculum_chart("Share of each source over tokens", run, languages)
    text = "Share of each source in the tokens trained on, as planned, stacked."
    if names := [
        plain(get(stage, "name"))
        for stage in rows(run.config, "stages")
        if get(stage, "mixture", "order") == "shuffled"
    ]:
        text += (
            f" Examples come in a random order in {', '.join(names)}: over a part of "
            "it, shares are about these."
        )
    yield section(f"{who}Curriculum", text, content)
    yield from exposure_sections(run, who, languages)


def lineage_section(run: Run, who: str) -> Markup:
    """Where a run comes from."""
    content = block("chain", chain_of(run)) if run.lineage else gap("lineage.json")
    return section(
        f"{who}Lineage", "Where the model comes from, oldest first.", content
    )


def curriculum_table(table: Sequence[Mapping[str, Any]], seq_len: int) -> Table:
    """Share, tokens and epochs per stage and source, and the total of each language
    that has more than one source. "~" is before what is estimated."""
    lines: list[list[str]] = []
    for stage, group in itertools.groupby(table, lambda r: r["phase"]):
        lines += [[""] * 6] if lines else []
        languages: dict[str, list[Mapping[str, Any]]] = {}
        for r in group:
            languages.setdefault(r["source"].split("/")[0], []).append(r)
            epochs = (r["epochs"], r["epochs_total"])
            passes = ["?" if x is None else f"{x:.2f}" for x in epochs]
            lines.append([stage, r["source"], *amounts([r], seq_len), *passes])
        for language, sources in languages.items():
            if len(sources) > 1:
                total = amounts(sources, seq_len)
                lines.append([stage, f"{language}, all", *total, "", ""])
    heads = ("stage", "source", "share", "tokens", "epochs", "in all")
    return Table(heads, lines, left=(0, 1))


def amounts(sources: Sequence[Mapping[str, Any]], seq_len: int) -> tuple[str, str]:
    """The share and the tokens of sources together."""
    about = "~" if any(r.get("estimated") for r in sources) else ""
    share = sum(r["share"] for r in sources)
    tokens = sum(r["examples"] for r in sources) * seq_len
    return f"{about}{share:.2%}", f"{about}{short(tokens)}"
