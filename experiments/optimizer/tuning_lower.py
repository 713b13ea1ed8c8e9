"""Lower peaks for AdamW, whose best was the lowest of tuning.py; the same seed.

    gamayun study experiments/optimizer/tuning_lower.py \
        --out experiments/optimizer/tuning_lower
"""

import dataclasses
from pathlib import Path

from gamayun_jax.study import design as s

PEAKS = (5e-4, 1e-3)


def get_study() -> s.Study:
    tuning = s.load_study(Path(__file__).with_name("tuning.py"))
    (first, *_) = tuning.arms  # AdamW's
    (stage,) = first.config.stages
    arms = []
    for peak in PEAKS:
        schedule = dataclasses.replace(stage.schedule, peak=peak)
        stages = (dataclasses.replace(stage, schedule=schedule),)
        cfg = dataclasses.replace(first.config, stages=stages)
        levels = {"optimizer": "adamw", "peak": f"{peak:g}"}
        arms.append(s.Arm(levels, cfg, seeds=first.seeds))
    return dataclasses.replace(
        tuning,
        name="optimizer-tuning-lower",
        question="Is a lower peak of the learning rate better for AdamW?",
        arms=tuple(arms),
    )
