"""Does the scatter of a real shuffle matter? `single` is interleaved evenly, `shuffled`
serves the same examples in a random order of the whole run.

    gamayun corpus build experiments/tiny.py --out build/demo-corpus
    gamayun study experiments/shuffled/study.py --out experiments/shuffled

The demo's model, stages' contents and schedule; experiments/shuffled/short.py is the
same on a fifth of the tokens.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s


def get_study(part: int = 1, seeds: tuple[int, ...] = (0, 1, 2)) -> s.Study:
    """`part`: by which the demo's tokens are divided."""
    cfg = c.load_config(
        Path(__file__).parents[1] / "tiny.py", {"stages.enrich.mixture.ramp_tokens": 0}
    )

    def shorter(stage: c.StageConfig) -> c.StageConfig:
        schedule = dataclasses.replace(
            stage.schedule,
            warmup_tokens=stage.schedule.warmup_tokens // part,
            decay_tokens=stage.schedule.decay_tokens // part,
        )
        return dataclasses.replace(
            stage, tokens=stage.tokens // part, schedule=schedule
        )

    asked = dataclasses.replace(cfg.evaluation, max_units=60)
    stages = tuple(map(shorter, cfg.stages))
    cfg = dataclasses.replace(cfg, stages=stages, evaluation=asked)
    return s.Study(
        name="shuffled",
        question="Does the scatter of a real shuffle matter?",
        arms=(
            s.Arm({"order": "single"}, cfg, seeds, "single"),
            s.Arm({"order": "shuffled"}, cfg, seeds, "shuffled"),
        ),
        outcomes=(s.Outcome("all", ("help", "udhr"), "all"),),
        primary="all",
        hypotheses=(
            s.Hypothesis(
                "scatter",
                "single is better than shuffled",
                better={"order": "single"},
                than={"order": "shuffled"},
            ),
        ),
    )
