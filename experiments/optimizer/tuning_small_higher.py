"""A higher peak for both, whose best was the highest of tuning_small.py; the same seed.

gamayun study experiments/optimizer/tuning_small_higher.py \
    --out experiments/optimizer/tuning_small_higher
"""

import dataclasses
from pathlib import Path

from gamayun_jax.study import design as s

PEAK = 1.6e-2


def get_study() -> s.Study:
    tuning = s.load_study(Path(__file__).with_name("tuning_small.py"))
    arms = []
    for former in (a for a in tuning.arms if a.levels["peak"] == "0.008"):
        (stage,) = former.config.stages
        schedule = dataclasses.replace(stage.schedule, peak=PEAK)
        stages = (dataclasses.replace(stage, schedule=schedule),)
        cfg = dataclasses.replace(former.config, stages=stages)
        levels = {**former.levels, "peak": f"{PEAK:g}"}
        arms.append(s.Arm(levels, cfg, seeds=former.seeds))
    return dataclasses.replace(
        tuning,
        name="optimizer-tuning-small-higher",
        question="Is a higher peak of the learning rate better?",
        arms=tuple(arms),
    )
