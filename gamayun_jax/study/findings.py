"""What a study's records say: the registered comparisons, and all that is exploratory.

`analyse` reads a study's folder (registration.json, records/, units.json) and applies
the rules of analysis.py. Nothing else is needed: run folders may be gone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gamayun_jax.config import UserError
from gamayun_jax.study.analysis import (
    RULES,
    Difference,
    Record,
    Resampled,
    difference,
    outcome_of,
    paired_difference,
    verdicts,
)
from gamayun_jax.study.design import (
    PER_BYTE,
    PER_QUESTION,
    RETRIEVAL,
    SHARE_MISSED,
    Outcome,
)
from gamayun_jax.study.records import check_sums, read_records, read_units
from gamayun_jax.study.registration import read_registration

NO_VERDICT, EXCLUDED = "no verdict yet", "excluded"


@dataclass(frozen=True)
class ArmRuns:
    """An arm as registered, and what became of its runs.

    Attributes:
      plan: its part of the registration.
      done: seed -> record.
      diverged: seed -> why.
      missing: seeds without a record.
      other: what its runs served other than registered, in a sentence; "" if nothing:
        then it is left out of all comparisons.
    """

    name: str
    plan: Mapping[str, Any]
    done: Mapping[int, Record]
    diverged: Mapping[int, str]
    missing: Sequence[int]
    other: str = ""

    @property
    def levels(self) -> Mapping[str, str]:
        return self.plan["levels"]

    def values(self, outcome: Outcome) -> dict[int, float]:
        """Seed -> outcome."""
        return {s: outcome_of(r["sets"], outcome) for s, r in self.done.items()}


@dataclass(frozen=True)
class Compared:
    """Two arms in one outcome.

    Attributes:
      kind: registered, exploratory, language, size or average.
      difference: `arm` minus `than`, below 0: `arm` is better.
      left_out: seeds of which one run diverged.
      name, claim, p_adjusted, verdict: of registered hypotheses.
    """

    kind: str
    arm: str
    than: str
    outcome: str
    difference: Difference
    left_out: Sequence[int] = ()
    name: str = ""
    claim: str = ""
    p_adjusted: float | None = None
    verdict: str = ""
    language: str = ""
    set: str = ""

    def row(self) -> dict[str, Any]:
        """Flat and plain; numbers that are not known are None."""
        d, e = self.difference, self.difference.estimate
        return {
            "kind": self.kind, "name": self.name, "claim": self.claim,
            "arm": self.arm, "than": self.than, "outcome": self.outcome,
            "set": self.set, "language": self.language,
            "difference": None if math.isnan(e.value) else e.value,
            "low": e.low, "high": e.high, "n": d.n,
            "p": None if d.sd is None else e.p, "p_adjusted": self.p_adjusted,
            "p_signs": d.signs, "sd": d.sd, "smallest_effect": d.smallest,
            "verdict": self.verdict, "left_out": list(self.left_out),
            "by_seed": {str(k): v for k, v in d.by_seed.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """All that a study's page shows.

    Attributes:
      frozen: the registration.
      outcomes: all, the primary one first.
    """

    frozen: Mapping[str, Any]
    arms: Sequence[ArmRuns]
    outcomes: Sequence[Outcome]
    units: Mapping[str, Any]
    hypotheses: Sequence[Compared] = ()
    exploratory: Sequence[Compared] = ()
    languages: Sequence[Compared] = ()
    sizes: Sequence[Compared] = ()
    averages: Sequence[Compared] = ()
    texts: Mapping[str, Resampled] = field(default_factory=dict, repr=False)

    @property
    def study(self) -> Mapping[str, Any]:
        return self.frozen["study"]

    @property
    def other_rules(self) -> list[str]:
        """Rules of the registration that this release words or applies differently."""
        now = json.loads(json.dumps(RULES))
        return [k for k, v in self.frozen["analysis"].items() if now.get(k) != v]

    @property
    def planned(self) -> int:
        return sum(len(a.plan["seeds"]) for a in self.arms)

    @property
    def missing(self) -> int:
        return sum(len(a.missing) for a in self.arms)

    def arm(self, name: str) -> ArmRuns:
        return next(a for a in self.arms if a.name == name)

    def find(self, levels: Mapping[str, str]) -> ArmRuns:
        """The arm with these levels; a study is refused unless there is one."""
        return next(a for a in self.arms if {**a.levels, **levels} == {**a.levels})

    def outcome(self, name: str) -> Outcome:
        return next(
            o for o in self.outcomes if o.name == (name or self.study["primary"])
        )

    def unit(self, outcome: str) -> str:
        """What an outcome is measured in."""
        measured = self.outcome(outcome).sets
        if measured[0].startswith(RETRIEVAL):
            return SHARE_MISSED
        sizes = (
            size
            for corpus in self.units.values()
            for name in measured
            for of in corpus.get(name, {}).values()
            for size in of["bytes"]
        )
        questions = {size == 1 for size in sizes} == {True}
        return PER_QUESTION if questions else PER_BYTE

    def known_languages(self) -> list[str]:
        """Of all held-out sets, in the order of the units."""
        sets = (of for corpus in self.units.values() for of in corpus.values())
        return list(dict.fromkeys(itertools.chain(*sets)))

    def compare(
        self, kind: str, a: ArmRuns, b: ArmRuns, outcome: Outcome, **more: Any
    ) -> Compared:
        """Two arms by the rules, over the seeds that both finished."""
        shared = [s for s in a.plan["seeds"] if s in b.plan["seeds"]]
        lost = [s for s in shared if s in a.diverged or s in b.diverged]
        pairs = {
            s: (a.done[s], b.done[s]) for s in shared if s in a.done and s in b.done
        }
        if a.other or b.other:
            pairs = {}
        found = difference({})
        if pairs:
            text = self.text_of(a, b)
            found = paired_difference(pairs, outcome, text)
        return Compared(kind, a.name, b.name, outcome.name, found, lost, **more)

    def text_of(self, a: ArmRuns, b: ArmRuns) -> Resampled:
        """The held-out texts of two arms; UserError where they are not the same."""
        one, other = (self.texts[arm.plan["corpus"]] for arm in (a, b))
        if one is not other:
            raise UserError(
                f"arms {a.name} and {b.name} were scored on other held-out texts, so "
                "that they do not compare: build their corpora with the same held-out "
                "sets"
            )
        return one


def analyse(folder: Path) -> Findings:
    """The findings of a study's folder, whole or under way.

    Raises:
      UserError: no study there, or records that do not belong to it.
    """
    frozen = read_registration(folder)
    records = read_records(folder, frozen["sha256"])
    arms = [arm_runs(row, records) for row in frozen["study"]["arms"]]
    units = read_units(folder) if any(a.done for a in arms) else {}
    for arm in arms:
        for record in arm.done.values():
            if record["corpus"] not in units:
                raise UserError(
                    f"units.json lacks the corpus of arm {arm.name}: take it from "
                    "where its records are from"
                )
            check_sums(record, units[record["corpus"]])
        check_copies(arm)
    texts: dict[str, Resampled] = {}
    for corpus, of in units.items():
        same = [t for t in texts.values() if t.units == of]
        texts[corpus] = same[0] if same else Resampled(of)
    study = frozen["study"]
    outcomes = [Outcome(**{**o, "sets": tuple(o["sets"])}) for o in study["outcomes"]]
    outcomes.sort(key=lambda o: o.name != study["primary"])
    f = Findings(frozen, arms, outcomes, units, texts=texts)
    f = replace(f, hypotheses=registered(f))
    return replace(
        f,
        exploratory=list(exploratory(f)),
        languages=list(by_language(f)) if units else [],
        sizes=list(by_size(f)),
        averages=list(averages(f)),
    )


def check_copies(arm: ArmRuns) -> None:
    """Raise UserError for two seeds of an arm with the very same results."""
    seen: dict[str, int] = {}
    for seed, record in arm.done.items():
        told = json.dumps(record["bits"], sort_keys=True)
        if told in seen:
            raise UserError(
                f"the records of arm {arm.name}, seeds {seen[told]} and {seed} are the "
                "same: one is a copy; delete it, and the run is made again"
            )
        seen[told] = seed


def arm_runs(
    row: Mapping[str, Any], records: Mapping[tuple[str, int], Record]
) -> ArmRuns:
    """An arm's runs, with what they served held against the registration."""
    name = "-".join(row["levels"].values())
    of = {s: records[name, s] for s in row["seeds"] if (name, s) in records}
    done = {s: r for s, r in of.items() if r["status"] == "done"}
    diverged = {s: str(r.get("why", "")) for s, r in of.items() if s not in done}
    missing = [s for s in row["seeds"] if s not in of]
    other = []
    for seed, record in done.items():
        for source in dict.fromkeys([*row["served"], *record["served"]]):
            pair = [int(x["served"].get(source, 0)) for x in (row, record)]
            if pair[0] != pair[1]:
                other.append(
                    f"seed {seed} served {pair[1]} examples of {source}, not {pair[0]}"
                )
    told = "; ".join(other[:3]) + (f"; {len(other) - 3} more" if other[3:] else "")
    return ArmRuns(name, row, done, diverged, missing, told)


def registered(f: Findings) -> list[Compared]:
    """The hypotheses, in order, with verdicts once all runs are there."""
    found = []
    for row in f.study["hypotheses"]:
        a, b = f.find(row["better"]), f.find(row["than"])
        told = {"name": row["name"], "claim": row["claim"]}
        found.append(f.compare("registered", a, b, f.outcome(row["outcome"]), **told))
    judged = verdicts([c.difference for c in found])
    for i, (p, verdict) in enumerate(judged):
        c = found[i]
        if f.arm(c.arm).other or f.arm(c.than).other:
            found[i] = replace(c, verdict=EXCLUDED)
        elif f.missing:
            found[i] = replace(c, verdict=NO_VERDICT)
        else:
            known = None if c.difference.sd is None else p
            found[i] = replace(c, p_adjusted=known, verdict=verdict)
    return found


def matched_pairs(f: Findings) -> Iterable[tuple[ArmRuns, ArmRuns]]:
    """Pairs of arms that serve the same examples and are of one size, if there are."""
    if f.study["matched"] is None:
        return
    factors = {*f.study["matched"], *({"size"} & f.arms[0].levels.keys())}
    for b, a in itertools.combinations(f.arms, 2):
        if all(a.levels[k] == b.levels[k] for k in factors):
            yield a, b


def exploratory(f: Findings) -> Iterable[Compared]:
    """All pairs of matched arms in all outcomes that no hypothesis is about."""
    asked = {(frozenset((c.arm, c.than)), c.outcome) for c in f.hypotheses}
    for outcome in f.outcomes:
        for a, b in matched_pairs(f):
            if (frozenset((a.name, b.name)), outcome.name) not in asked:
                yield f.compare("exploratory", a, b, outcome)


def by_language(f: Findings) -> Iterable[Compared]:
    """The registered pairs on each held-out set of their outcome: every language alone,
    and the outcome's mean over languages. A pair is told once."""
    seen = set()
    for c in f.hypotheses:
        a, b, outcome = f.arm(c.arm), f.arm(c.than), f.outcome(c.outcome)
        sets = f.units.get(a.plan["corpus"], {})
        for name in outcome.sets:
            if (c.arm, c.than, name) in seen or name not in sets:
                continue
            seen.add((c.arm, c.than, name))
            for key in dict.fromkeys([*sets[name], outcome.languages]):
                one = Outcome(outcome.name, (name,), key)
                more = {"name": c.name, "language": key, "set": name}
                yield f.compare("language", a, b, one, **more)


def by_size(f: Findings) -> Iterable[Compared]:
    """The registered pairs of one size, at every size; none without that factor."""
    if "size" not in f.arms[0].levels:
        return
    sizes = list(dict.fromkeys(a.levels["size"] for a in f.arms))
    seen = set()
    for c in f.hypotheses:
        pair = f.arm(c.arm).levels, f.arm(c.than).levels
        if len(sizes) < 2 or pair[0]["size"] != pair[1]["size"]:
            continue
        for size in sizes:
            at = [{**levels, "size": size} for levels in pair]
            arms = [a for levels in at for a in f.arms if a.levels == levels]
            key = tuple(a.name for a in arms), c.outcome
            if len(arms) == 2 and key not in seen:
                seen.add(key)
                a, b = arms
                name = pair_name(a.levels, b.levels)
                yield f.compare("size", a, b, f.outcome(c.outcome), name=name)


def pair_name(a: Mapping[str, str], b: Mapping[str, str]) -> str:
    """What two arms differ by, and what they share but for the size: "single − staged,
    decay"."""
    sides = ["-".join(x[k] for k in a if a[k] != b[k]) for x in (a, b)]
    shared = [v for k, v in a.items() if v == b[k] and k != "size"]
    return ", ".join([f"{sides[0]} − {sides[1]}", *shared])


def averages(f: Findings) -> Iterable[Compared]:
    """What averaging checkpoints changed, over seeds alone: of the last parameters no
    units are kept."""
    for arm in f.arms:
        kept = {s: r for s, r in arm.done.items() if r.get("raw")}
        if not kept or arm.other:
            continue
        for outcome in f.outcomes:
            by_seed = {
                s: outcome_of(r["sets"], outcome) - outcome_of(r["raw"], outcome)
                for s, r in kept.items()
            }
            pair = arm.name, arm.name, outcome.name
            yield Compared("average", *pair, difference(by_seed))


def noise(f: Findings) -> list[dict[str, Any]]:
    """Of each arm and outcome: n, mean and standard deviation over seeds."""
    rows = []
    for arm in f.arms:
        for outcome in f.outcomes:
            values = list(arm.values(outcome).values())
            rows.append(
                {
                    "arm": arm.name, "outcome": outcome.name, "n": len(values),
                    "mean": float(np.mean(values)) if values else None,
                    "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                }
            )  # fmt: skip
    return rows


def runs(f: Findings) -> list[dict[str, Any]]:
    """A row for each run: levels, seed, status, outcomes, and every language."""
    rows = []
    for arm in f.arms:
        for seed in arm.plan["seeds"]:
            record = arm.done.get(seed)
            status = "done" if record else "diverged"
            row = {"arm": arm.name, **arm.levels, "seed": seed}
            row["status"] = "missing" if seed in arm.missing else status
            for outcome in f.outcomes:
                value = outcome_of(record["sets"], outcome) if record else None
                row[outcome.name] = value
            for name, of_set in record["sets"].items() if record else ():
                row |= {f"{name}/{k}": v for k, v in of_set.items()}
            rows.append(row)
    return rows


def to_json(f: Findings) -> dict[str, Any]:
    """results.json: everything that tables and figures show, unrounded."""
    return {
        "study": f.study["name"],
        "sha256": f.frozen["sha256"],
        "runs": {
            "planned": f.planned,
            "done": sum(len(a.done) for a in f.arms),
            "missing": {a.name: list(a.missing) for a in f.arms if a.missing},
            "diverged": {
                a.name: {str(s): why for s, why in a.diverged.items()}
                for a in f.arms
                if a.diverged
            },
            "other_exposure": {a.name: a.other for a in f.arms if a.other},
        },
        **{
            kind: [c.row() for c in getattr(f, kind)]
            for kind in ("hypotheses", "exploratory", "languages", "sizes", "averages")
        },
        "noise": noise(f),
    }
