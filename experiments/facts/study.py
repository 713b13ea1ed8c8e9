"""Facts stated in English alone: are they known in other languages, and when stated?

    python experiments/facts/make_facts.py build/facts
    gamayun corpus build experiments/facts/config.py --out build/facts-corpus
    gamayun study experiments/facts/study.py --out experiments/facts

`early` reads the facts in the first half and `late` in the second, the same examples;
`never` reads other English instead. Asked at the end, in 12 languages.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s

SEEDS = tuple(range(5))


def get_study() -> s.Study:
    base = c.load_config(Path(__file__).parent / "config.py")
    asked = dataclasses.replace(base.evaluation, tasks_every_steps=0)  # at stages' ends
    base = dataclasses.replace(base, evaluation=asked)
    without = tuple(
        dataclasses.replace(
            stage,
            mixture=dataclasses.replace(
                stage.mixture, shares={"en/facts": 0.0, "en/help": 0.37}
            ),
        )
        for stage in base.stages
    )
    never = dataclasses.replace(base, stages=without)
    early, late, not_at_all = (
        {"facts": "stated", "when": "early"},
        {"facts": "stated", "when": "late"},
        {"facts": "none", "when": "never"},
    )
    return s.Study(
        name="facts",
        question="Are facts that were stated in English alone known in other "
        "languages, and does it matter when they were stated?",
        arms=(
            s.Arm(early, base, SEEDS),
            s.Arm(late, base, SEEDS, twin="reversed"),
            s.Arm(not_at_all, never, SEEDS),
        ),
        outcomes=(
            s.Outcome("names, others", ("facts_river",)),
            s.Outcome("names, English", ("facts_river",), "en"),
            s.Outcome("nouns, others", ("facts_goods",)),
            s.Outcome("nouns, English", ("facts_goods",), "en"),
            s.Outcome("text, others", ("help", "udhr")),
        ),
        primary="names, others",
        hypotheses=(
            s.Hypothesis(
                "names carry over",
                "A river's name, stated late in English alone, is known in the other "
                "languages better than if it was never stated.",
                better=late,
                than=not_at_all,
            ),
            s.Hypothesis(
                "nouns carry over",
                "What a town is known for, a common noun that differs by language, is "
                "known so too.",
                better=late,
                than=not_at_all,
                outcome="nouns, others",
            ),
            s.Hypothesis(
                "early names last",
                "A river's name stated in the first half alone is still known in the "
                "other languages at the end.",
                better=early,
                than=not_at_all,
            ),
            s.Hypothesis(
                "late is better",
                "The same statements are worth more late than early, in the other "
                "languages.",
                better=late,
                than=early,
            ),
        ),
        matched=("facts",),
        notes=(
            "Two pilot runs (seed 100, `early` alone) came before: with 48 towns "
            "English itself learnt little, so there are 16; then 52 % of the names "
            "were right after the first half, nouns were at chance outside of "
            "English, and both were at chance at the end. The third hypothesis is "
            "expected to fail.",
            "Peak and schedule are the demo's.",
        ),
    )
