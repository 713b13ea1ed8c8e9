"""What a study asks: its arms, seeds, outcomes and hypotheses, as plain dataclasses.

A study file exports `get_study() -> Study`. Everything in it is decided before the
first run (registration.py); what is looked at beyond it is exploratory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gamayun_jax.config import Config
from gamayun_jax.fields import Seed, Share, UserError, Whole, call_in_file, settle

Levels = Mapping[str, str]  # factor -> level
# Beginnings of the names of measures (measures.py), and what sets are measured in.
ANSWER, RETRIEVAL = "answer:", "retrieval:"
PER_BYTE, PER_QUESTION = "bits per byte", "bits per question"
SHARE_MISSED = "share of translations missed"


@dataclass(frozen=True)
class Arm:
    """One way to train: a config, and the levels of the study's factors it stands for.

    Attributes:
      levels: factor -> level, such as {"size": "1M", "order": "reversed"}.
      twin: made of `config` by data/controls.py when the corpus is open, so that it
        serves the same examples in another order; "" for `config` itself.
      seeds: each is a run; it decides the initialisation and the order of examples.
      average_tokens: what is measured are not the last parameters but the uniform mean
        of the checkpoints in so many tokens before the end; 0: the last ones.
    """

    levels: Levels
    config: Config
    seeds: tuple[Seed, ...]
    twin: Literal["", "single", "shuffled", "reversed", "ramped"] = ""
    average_tokens: Whole = 0

    def __post_init__(self):
        where = f"an arm with levels={dict(self.levels)!r}"
        if not self.levels:
            raise UserError(f"{where}: give it one, by which it is known")
        for level in self.levels.values():
            if not isinstance(level, str) or not safe(level):
                raise UserError(
                    f"{where}: {level!r} becomes part of a file's name: write a text "
                    "of letters, digits, '.' and '_'"
                )

    @property
    def name(self) -> str:
        """The levels joined by hyphens: of files, tables and messages."""
        return "-".join(self.levels.values())


@dataclass(frozen=True)
class Outcome:
    """Bits per byte, the mean over held-out sets of the mean over languages.

    A task of the configs (evaluation.tasks) is a set too. Of multiple choice it is the
    bits per question that the right choice takes among the choices
    (records.choice_bits); of the other kinds, bits per byte of the text or target.
    "answer:TASK" and "retrieval:SET:LAYER" are further measures (measures.py). Of all
    of them, less is better.

    Attributes:
      sets: held-out sets, tasks or measures, all in one unit.
      languages: "others" (all but English), "all", or one language.
    """

    name: str
    sets: tuple[str, ...]
    languages: str = "others"

    def languages_of(self, known: Sequence[str]) -> list[str]:
        """The languages that it is the mean of, of those that a study has."""
        if self.languages in ("others", "all"):
            return [k for k in known if self.languages == "all" or k != "en"]
        return [k for k in known if k == self.languages]


@dataclass(frozen=True)
class Hypothesis:
    """That the arm `better` has a lower outcome than the arm `than`.

    Attributes:
      better, than: levels that tell one arm each.
      outcome: name of an outcome; "" for the primary one.
    """

    name: str
    claim: str  # one sentence, as it would stand in a paper
    better: Levels
    than: Levels
    outcome: str = ""


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and how the answer will be read.

    Attributes:
      primary: name of the outcome that decides.
      matched: arms with the same levels of these factors serve the same examples; None
        where arms are not to be matched.
      noise: standard deviation over seeds, in bits per byte, of the difference of two
        arms in the primary outcome, as measured before; 0: not known.
      worthwhile: the smallest difference in the primary outcome that would matter, in
        bits per byte; a contrast that could miss it is underpowered. 0: not said.
      exclusions: which runs are left out of the analysis, and why, in words; runs that
        diverge are always named and never averaged. One does that has
        divergence.nonfinite such steps in a row (or a spike), alone or side by side.
      notes: whatever a reader should know: what was tuned before, and on what.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    outcomes: tuple[Outcome, ...]
    primary: str
    hypotheses: tuple[Hypothesis, ...]
    matched: tuple[str, ...] | None = ()
    noise: Share = 0.0
    worthwhile: Share = 0.0
    exclusions: str = "none"
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __post_init__(self):
        settle(self, "study")
        self._check_names()
        for hypothesis in self.hypotheses:
            where = f"hypothesis {hypothesis.name!r}"
            self.outcome_of(hypothesis)
            sides = [self.find(hypothesis.better, where)]
            sides.append(self.find(hypothesis.than, where))
            if sides[0] is sides[1]:
                raise UserError(f"{where} compares arm {sides[0].name} with itself")
            shared = set(sides[0].seeds) & set(sides[1].seeds)
            if len(shared) < 2:
                raise UserError(
                    f"{where}: arms {sides[0].name} and {sides[1].name} share "
                    f"{len(shared)} seeds; differences are by seed: give both two or "
                    "more of the same seeds"
                )

    def _check_outcomes(self) -> None:
        columns = {"arm", "seed", "status", *self.arms[0].levels}
        for outcome in self.outcomes:
            if not outcome.sets:
                raise UserError(f"outcome {outcome.name!r}: sets is empty")
            if outcome.name in columns or "/" in outcome.name:
                raise UserError(
                    f"outcome {outcome.name!r} is called as another column of runs.csv "
                    "is: give it another name"
                )

    def _check_names(self) -> None:
        for what, names in (
            ("arms", [a.name for a in self.arms]),
            ("outcomes", [o.name for o in self.outcomes]),
            ("hypotheses", [h.name for h in self.hypotheses]),
        ):
            if not names and what != "hypotheses":
                raise UserError(f"study {self.name}: {what} is empty")
            if twice := {n for n in names if names.count(n) > 1}:
                raise UserError(f"study {self.name}: two {what} are {min(twice)!r}")
            if bad := [n for n in names if not n.isprintable() or not n.strip()]:
                raise UserError(
                    f"study {self.name}: {what} have the name {bad[0]!r}: it stands in "
                    "tables, so write it on one line"
                )
        self._check_outcomes()
        for arm in self.arms:
            if not arm.seeds or len(set(arm.seeds)) < len(arm.seeds):
                raise UserError(
                    f"arm {arm.name}: seeds={arm.seeds}: list one or more, each once"
                )
            if set(arm.levels) != set(self.arms[0].levels):
                raise UserError(
                    f"arm {arm.name} has the factors {', '.join(arm.levels)}, and "
                    f"{self.arms[0].name} has {', '.join(self.arms[0].levels)}: give "
                    "all arms a level of each factor"
                )
            checkpoints = arm.config.checkpoint
            if arm.average_tokens and (
                checkpoints.keep_every_steps != checkpoints.every_steps
            ):
                raise UserError(
                    f"arm {arm.name}: average_tokens={arm.average_tokens} needs its "
                    "checkpoints: set checkpoint.keep_every_steps to "
                    f"checkpoint.every_steps={checkpoints.every_steps}"
                )
        for factor in self.matched or ():
            if factor not in self.arms[0].levels:
                raise UserError(
                    f"study {self.name}: matched names {factor!r}, which is no factor"
                )
        self.outcome(self.primary)

    def outcome(self, name: str) -> Outcome:
        """UserError for an outcome that is not measured."""
        for outcome in self.outcomes:
            if outcome.name == name:
                return outcome
        raise UserError(
            f"study {self.name}: no outcome is called {name!r}; there are "
            f"{', '.join(o.name for o in self.outcomes)}"
        )

    def outcome_of(self, hypothesis: Hypothesis) -> Outcome:
        """The outcome that a hypothesis is about."""
        return self.outcome(hypothesis.outcome or self.primary)

    def find(self, levels: Levels, where: str) -> Arm:
        """The one arm with these levels; UserError unless there is one."""
        found = [a for a in self.arms if {**a.levels, **levels} == {**a.levels}]
        if len(found) != 1:
            raise UserError(
                f"{where}: {len(found)} arms have {dict(levels)}: give the levels that "
                f"tell one of {', '.join(a.name for a in self.arms)}"
            )
        return found[0]

    def matched_groups(self) -> list[list[Arm]]:
        """Arms that must serve the same examples, together."""
        if self.matched is None:
            return [[a] for a in self.arms]

        def key(arm: Arm) -> tuple[str, ...]:
            return tuple(arm.levels[f] for f in self.matched or ())

        ordered = sorted(self.arms, key=key)
        return [list(group) for _, group in itertools.groupby(ordered, key)]

    def runs(self) -> list[tuple[Arm, int]]:
        """Every run: all arms of a seed before the next seed, so that a study that is
        stopped early has whole pairs."""
        seeds = dict.fromkeys(itertools.chain(*(a.seeds for a in self.arms)))
        return [(a, seed) for seed in seeds for a in self.arms if seed in a.seeds]


def safe(level: str) -> bool:
    """Whether a level may be part of a file's name."""
    return bool(level.strip(".")) and all(c.isalnum() or c in "._" for c in level)


def load_study(path: str | Path) -> Study:
    """Run a study file's `get_study()`.

    Raises:
      UserError: no such file, no `get_study`, another return type, and whatever the
        file raises, with the last of its lines that was run.
    """
    defined, study = call_in_file(Path(path), "get_study")
    if not defined:
        raise UserError(f"study {path} does not define get_study() -> Study")
    if not isinstance(study, Study):
        raise UserError(
            f"study {path}: get_study() returned {type(study).__name__}, not Study"
        )
    return study


def with_seed(cfg: Config, arm: str, seed: int) -> Config:
    """A run's config. Where it would go back to a checkpoint it has diverged: what it
    left out then would make its examples others than its twin's."""
    divergence = dataclasses.replace(cfg.divergence, rollbacks=0)
    name = f"{arm}-{seed}"
    return dataclasses.replace(cfg, name=name, seed=seed, divergence=divergence)
