"""What a study will cost and what it can show, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from gamayun_jax.data.control_files import ledger_text
from gamayun_jax.study.analysis import smallest_effect
from gamayun_jax.study.design import Hypothesis, Study
from gamayun_jax.study.records import read_records
from gamayun_jax.study.registration import MadeArm, make_arms, register
from gamayun_jax.study.runner import cost
from gamayun_jax.tables import Table


def plan_text(study: Study, folder: Path) -> str:
    """Runs, their cost, what they serve, and the smallest effects that they can show.

    Args:
      folder: of the study; its records, where there are some, say how long runs take.
    """
    made = make_arms(study)
    sha256 = register(folder, study, made, write=False)
    records = read_records(folder)
    parts = [f"{study.name}: {study.question}", f"registration: {sha256}"]
    parts.append(cost_text(study, made, records))
    for group in study.matched_groups():
        if len(group) > 1:
            first = made[group[0].name]
            sizes = first.corpus.examples(first.cfg.data.seq_len)
            plans = {a.name: made[a.name].plan for a in group}
            parts.append(ledger_text(plans, first.cfg, sizes))
    parts.append(power_text(study))
    return "\n\n".join(parts)


def cost_text(study: Study, made: dict[str, MadeArm], records: dict) -> str:
    """A table of the arms: runs, tokens, FLOPs, seconds of a run where one is done."""
    seconds: dict[str, list[float]] = {}
    for (arm, _), record in records.items():
        if record["status"] == "done":
            seconds.setdefault(arm, []).append(record["made_with"]["seconds"])
    rates = [
        mean / cost(made[arm])
        for arm, each in seconds.items()
        if arm in made and (mean := sum(each) / len(each))
    ]
    rate = sum(rates) / len(rates) if rates else None
    rows, left = [], 0.0
    for arm in study.arms:
        flops = cost(made[arm.name])
        undone = sum((arm.name, seed) not in records for seed in arm.seeds)
        cfg = made[arm.name].cfg
        tokens = cfg.total_steps * cfg.tokens_per_step
        left += undone * flops
        time = f"{rate * flops:,.0f}" if rate else "?"
        runs = f"{len(arm.seeds) - undone} of {len(arm.seeds)}"
        rows.append([arm.name, runs, f"{tokens:,}", f"{flops:.1e}", time])
    heads = ("arm", "runs done", "tokens a run", "FLOPs a run", "seconds a run")
    whole = (
        f"about {rate * left / 3600:.1f} h left at the pace of the runs that are done"
        if rate
        else "seconds are known when a run is done"
    )
    return f"{Table(heads, rows).text()}\n{left:.1e} FLOPs to do; {whole}"


def power_text(study: Study) -> str:
    """What each hypothesis could miss; those that are underpowered are named."""
    if not study.noise:
        return (
            "What it can show is not known: measure the standard deviation over seeds "
            "of a difference of arms (a few runs of two arms), and give Study.noise"
        )
    lines = [
        "Smallest difference that the t test over seeds finds in 4 of 5 studies like "
        f"this one (two-sided 5 %, standard deviation over seeds {study.noise:g}); the "
        "interval over languages and texts, and Holm, ask for more:"
    ]
    for hypothesis in study.hypotheses:
        n = len(shared_seeds(study, hypothesis))
        effect = smallest_effect(study.noise, n)
        weak = study.worthwhile and effect > study.worthwhile
        more = f"  UNDERPOWERED for {study.worthwhile:g}" if weak else ""
        lines.append(f"  {hypothesis.name}: {effect:.4f} with {n} seeds{more}")
    return "\n".join(lines)


def shared_seeds(study: Study, hypothesis: Hypothesis) -> list[int]:
    """The seeds that both arms of a hypothesis have."""
    where = f"hypothesis {hypothesis.name!r}"
    better = study.find(hypothesis.better, where)
    than = study.find(hypothesis.than, where)
    return sorted({*better.seeds} & {*than.seeds})
