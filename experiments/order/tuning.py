"""The learning rate of each size, tuned on the single-phase arm alone, and frozen.

    gamayun study experiments/order/tuning.py --out experiments/order/tuning

Its seed is none of the study's (study.py), which takes the best peak of each size.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s

PEAKS = {
    "config.py": ("1M", (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    "config_3m.py": ("3M", (1e-3, 2e-3, 4e-3, 8e-3)),
    "config_25m.py": ("25M", (5e-4, 1e-3, 2e-3, 4e-3)),
}


def get_study() -> s.Study:
    arms = []
    for file, (size, peaks) in PEAKS.items():
        base = c.load_config(Path(__file__).with_name(file))
        for peak in peaks:
            stages = tuple(
                dataclasses.replace(
                    stage, schedule=dataclasses.replace(stage.schedule, peak=peak)
                )
                for stage in base.stages
            )
            cfg = dataclasses.replace(base, stages=stages)
            levels = {"size": size, "peak": f"{peak:g}"}
            arms.append(s.Arm(levels, cfg, seeds=(1000,), twin="single"))
    return s.Study(
        name="order-tuning",
        question="Which peak of the learning rate is best for one constant mixture?",
        arms=tuple(arms),
        outcomes=(s.Outcome("all", ("help", "udhr"), "all"),),
        primary="all",
        hypotheses=(),
    )
