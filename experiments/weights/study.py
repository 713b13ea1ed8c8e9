"""Is a share of the objective the same, sampled or weighted?

    gamayun corpus build experiments/tiny.py --out build/demo-corpus
    gamayun study experiments/weights/study.py --out experiments/weights

Three ways to give English 37 % of the objective and each other language an equal part
of the rest: to sample so; to sample English less and weigh its tokens up; to sample it
more and weigh them down. Packed rows, one stage, half as many tokens as the demo.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s

ENGLISH = 0.37  # of the objective
SAMPLED = {"sampled": ENGLISH, "weighted_up": 0.15, "weighted_down": 0.6}
TOKENS = 489 * 16 * 128


def shares(languages: tuple[str, ...], english: float) -> dict[str, float]:
    """Language -> share: English's, and the rest evenly."""
    rest = (1 - english) / (len(languages) - 1)
    return {k: english if k == "en" else rest for k in languages}


def get_study() -> s.Study:
    base = c.load_config(Path(__file__).parents[1] / "tiny.py")
    arms = []
    for name, english in SAMPLED.items():
        mixture = {f"{k}/help": v for k, v in shares(base.languages, english).items()}
        weights = c.TokenWeightConfig()
        if name != "sampled":
            objective = shares(base.languages, ENGLISH)
            weights = c.TokenWeightConfig("target_share", objective)
        schedule = c.ScheduleConfig(
            peak=4e-3, warmup_tokens=TOKENS // 20, decay_tokens=TOKENS // 5
        )
        stage = c.StageConfig(
            "all", TOKENS, c.MixtureConfig("explicit", mixture), schedule, weights
        )
        cfg = dataclasses.replace(base, stages=(stage,))
        arms.append(s.Arm({"share": name}, cfg, seeds=tuple(range(6))))
    return s.Study(
        name="weights",
        question="At equal shares of the objective, does it matter whether they are "
        "sampled or weighted?",
        arms=tuple(arms),
        outcomes=(
            s.Outcome("all", ("help", "udhr"), "all"),
            s.Outcome("others", ("help", "udhr")),
            s.Outcome("English", ("help", "udhr"), "en"),
        ),
        primary="all",
        hypotheses=(
            s.Hypothesis(
                "weighted up",
                "English is better when its share is sampled than when fewer of its "
                "tokens are weighted up.",
                better={"share": "sampled"},
                than={"share": "weighted_up"},
                outcome="English",
            ),
            s.Hypothesis(
                "weighted down",
                "The other languages are better when English's share is sampled than "
                "when more English is weighted down.",
                better={"share": "sampled"},
                than={"share": "weighted_down"},
                outcome="others",
            ),
        ),
        matched=None,
        worthwhile=0.02,
        notes=("Peak and schedule are the demo's; nothing was tuned for this study.",),
    )
