"""Control arms as experiment files, and the ledger of what every arm serves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gamayun_jax.config import Config, StageConfig, UserError
from gamayun_jax.data.controls import Base, check_counts, make_arm, stage_counts
from gamayun_jax.data.curriculum import ONE
from gamayun_jax.data.files import write_text
from gamayun_jax.data.ledger import SourceSize, exposure, grouped
from gamayun_jax.data.plan import DataPlan, make_data_plan
from gamayun_jax.tables import Table

MARK = "Written by `gamayun controls`"
ABOUT = {
    "single": "one stage with a constant mixture",
    "shuffled": "the examples of the run in a random order",
    "reversed": "what the stages serve, the last stage first",
    "ramped": "shares that slide to the end of the run",
}
FILE = '''"""Control `{arm}` of {config}: {about}.

    gamayun train {path} --workdir runs/{arm}

The same as the base but for its stages, with the same learning rate at every step.
Each source has as many examples as in the base, so the same ones, in another order.
{mark}; shares are exact, in parts of ONE.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c

BASE = Path(__file__).parent / {base}
SET = {overrides}
ONE = 1 << 30


def get_config() -> c.Config:
    cfg = c.load_config(BASE, SET)
    stages = (
{stages}
    )
    return dataclasses.replace(cfg, name={name}, stages=stages)
'''


# --- experiment files ------------------------------------------------------------


def write_arms(
    arms: Sequence[str],
    base: Base,
    config: Path,
    overrides: Sequence[str],
    out: Path,
) -> dict[str, Config]:
    """Make arms and write each as OUT/<arm>.py; returns their configs.

    Args:
      config, overrides: the file that the base was loaded from, and its --set.

    Raises:
      UserError: see `controls.make_arm`; a file of that name that is no arm. Nothing is
        written then.
    """
    made = {arm: make_arm(arm, base) for arm in arms}
    texts = {}
    for arm, cfg in made.items():
        path = out / f"{arm}.py"
        if path.exists() and MARK not in path.read_text("utf-8", errors="replace"):
            raise UserError(
                f"{path} exists and is no file of `gamayun controls`: give --out "
                "another folder"
            )
        texts[path] = arm_file(arm, cfg, base, config, overrides, path)
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_text(path, text)
    return made


def arm_file(
    arm: str,
    cfg: Config,
    base: Base,
    config: Path,
    overrides: Sequence[str],
    path: Path,
) -> str:
    """The text of an arm's experiment file, which is to be at `path`."""
    counts = stage_counts(make_data_plan(cfg, base.corpus))
    sources = base.plan.sources
    stages = [
        stage_text(stage, dict(zip(sources, n.tolist(), strict=True)))
        for stage, n in zip(cfg.stages, counts, strict=True)
    ]
    return FILE.format(
        arm=arm,
        config=config.name,
        about=ABOUT[arm],
        path=path.name,
        mark=MARK,
        base=quoted(os.path.relpath(config.resolve(), path.parent.resolve())),
        overrides=f"[{', '.join(map(quoted, overrides))}]",
        name=quoted(cfg.name),
        stages="\n".join(stages),
    )


def stage_text(stage: StageConfig, counts: Mapping[str, int]) -> str:
    """A stage as Python; `counts`: source -> examples in it."""
    mix = stage.mixture
    ramp = [f"ramp={quoted(mix.ramp)},", f"ramp_tokens={mix.ramp_tokens:_},"]
    shares = [
        f"    {quoted(name)}: {round(share * ONE):_} / ONE,"
        f"  # {share:.4%}, examples: {counts[name]:,}"
        for name, share in mix.shares.items()
    ]
    mixture = [
        'scheme="explicit",',
        *("shares={", *shares, "},"),
        *(ramp if mix.ramp_tokens else []),
        *(['order="shuffled",'] if mix.order == "shuffled" else []),
    ]
    inner = [
        f"name={quoted(stage.name)},",
        f"tokens={stage.tokens:_},",
        *("mixture=c.MixtureConfig(", *(f"    {line}" for line in mixture), "),"),
        *part_lines("schedule", stage.schedule),
        *part_lines("token_weights", stage.token_weights),
        *part_lines("transition", stage.transition),
    ]
    lines = ["c.StageConfig(", *(f"    {line}" for line in inner), "),"]
    return "\n".join(" " * 8 + line for line in lines)


def part_lines(name: str, part: Any) -> list[str]:
    """A part of a stage as Python, a field a line; what is at its default is left
    out."""
    fields = [
        (f.name, getattr(part, f.name))
        for f in dataclasses.fields(part)
        if f.default is dataclasses.MISSING or getattr(part, f.name) != f.default
    ]
    kind = type(part).__name__
    given = [f"    {k}={literal(v)}," for k, v in fields if v != {}]
    return [f"{name}=c.{kind}(", *given, "),"] if given else [f"{name}=c.{kind}(),"]


def literal(value: Any) -> str:
    """A plain value as Python."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        items = (f"{quoted(k)}: {v!r}" for k, v in value.items())
        return f"{{{', '.join(items)}}}"
    return f"{value:_}" if type(value) is int else repr(value)


def quoted(text: str) -> str:
    """A text as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def notes(cfg: Config, arms: Sequence[str]) -> list[str]:
    """What arms of this base do not tell, one line each."""
    ramps = [s.name for s in cfg.stages[1:] if s.mixture.ramp_tokens]
    found = []
    if len(cfg.stages) == 1:
        found.append(
            f"{cfg.name} has one stage, so its arms serve what it serves, evenly or "
            "shuffled: give a config with the stages whose order matters"
        )
    if ramps and "reversed" in arms:
        found.append(
            f"stages.{ramps[0]} begins with a ramp, and `reversed` changes by a step: "
            "compare it with a run without ramps (mixture.ramp_tokens=0) to see the "
            "order alone"
        )
    return found


# --- the ledger ------------------------------------------------------------------


def ledger_text(
    plans: Mapping[str, DataPlan], cfg: Config, sizes: Mapping[str, int] | None
) -> str:
    """What every arm serves of each source, and of each language with several sources.

    Tokens, epochs (passes over the source) and repeats (examples beyond its first
    pass) follow from the number of examples, which has a column for every plan.

    Args:
      plans: "base" and arms -> plan, the base first.
      cfg: the base.
      sizes: source -> examples in one epoch; None where they are not known.

    Raises:
      UserError: an arm serves another number of examples of a source.
    """
    served = {name: plan.served(plan.total_steps) for name, plan in plans.items()}
    base = next(iter(plans.values()))
    rows = [ledger_row(*row, served, cfg, sizes) for row in grouped(base.sources)]
    heads = ("source", "tokens", "epochs", "repeats", *served)
    examples = base.total_steps * base.batch_size
    for name, plan in plans.items():
        check_counts(name, base, plan)
    return (
        "examples of each source in every arm, and what follows from them\n"
        f"{Table(heads, rows).text()}\n"
        f"equal in every arm: {len(base.sources)} sources, {examples:,} examples"
    )


def ledger_row(
    name: str,
    sources: Sequence[str],
    served: Mapping[str, Mapping[str, int]],
    cfg: Config,
    sizes: Mapping[str, int] | None,
) -> list[str]:
    """A row of the ledger: sources together."""
    known = {s: SourceSize(n) for s, n in (sizes or {}).items()}
    seq_len = cfg.data.seq_len
    rows = [exposure(of_arm, known, sources, seq_len) for of_arm in served.values()]
    first = rows[0]
    epochs, repeats = "?", "?"
    if sizes is not None:
        epochs = "–" if first["epochs"] is None else f"{first['epochs']:.2f}"
        repeats = "0" if first["repeats"] is None else f"{first['repeats']:,}"
    counts = (f"{row['examples']:,}" for row in rows)
    return [name, f"{first['tokens']:,}", epochs, repeats, *counts]


def exposure_differences(
    record: Mapping[str, Any], plan: DataPlan, seq_len: int
) -> list[tuple[str, int, int]]:
    """Where a run's last record is not what a plan serves in all.

    Records count what the run's own plan served (`sources` in metrics.jsonl), so this
    tells a run that is not finished, or that was given other stages, sizes or sources.

    Args:
      record: the last one of a run, as in metrics.jsonl.

    Returns:
      (source, tokens planned, tokens recorded) of each source that differs; sources
      that only one of the two has count as 0 in the other.
    """
    planned = {name: n * seq_len for name, n in plan.served(plan.total_steps).items()}
    found = record.get("sources")
    recorded = {
        name: int(row["tokens"])
        for name, row in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(row, Mapping) and isinstance(row.get("tokens"), int)
    }
    return [
        (name, planned.get(name, 0), recorded.get(name, 0))
        for name in dict.fromkeys([*planned, *recorded])
        if planned.get(name, 0) != recorded.get(name, 0)
    ]


def check_text(
    run: str, record: Mapping[str, Any], plan: DataPlan, seq_len: int
) -> tuple[bool, str]:
    """Whether a run's last record has what a plan serves in all, and the same in words
    with every difference."""
    different = exposure_differences(record, plan, seq_len)
    if not different:
        tokens = plan.total_steps * plan.batch_size * seq_len
        return True, (
            f"{run}: as planned, {len(plan.sources)} sources, {tokens:,} tokens"
        )
    step = record.get("step")
    begun = (
        f" (at step {step} of {plan.total_steps})" if step != plan.total_steps else ""
    )
    rows = [[name, f"{a:,}", f"{b:,}", f"{b - a:+,}"] for name, a, b in different]
    heads = ("source", "tokens planned", "recorded", "difference")
    return False, (
        f"{run}: {len(different)} sources are not as planned{begun}\n"
        f"{Table(heads, rows).text()}"
    )


def check_advice(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """What to do about a run that did not serve what a config plans.

    Args:
      differences: dotted path -> (run's, config's) of the fields in which they differ.
    """
    other = {
        name: mine
        for name, (mine, _) in differences.items()
        if re.match(r"stages|languages|seed|data\.(seq|batch|block|max)", name)
    }
    if not other:
        return "its config plans the same: train it to its end, on the same corpus"
    if all(isinstance(value, int | float | str) for value in other.values()):
        told = " ".join(f"--set {name}={value}" for name, value in other.items())
        return (
            f"its config is another, of a shorter run perhaps: to check it, add {told}"
        )
    return (
        f"its config is another ({', '.join(other)}): check it with the file that it "
        "was trained with"
    )
