"""Lower peaks than those of tuning.py, whose best stood at the lower end of its grid.

gamayun study experiments/order/tuning_lower.py --out experiments/order/tuning_lower
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s

PEAKS = {
    "config.py": ("1M", (2e-4, 4e-4, 7.5e-4, 1e-3)),
    "config_3m.py": ("3M", (1e-4, 2.5e-4, 5e-4, 7.5e-4)),
    "config_25m.py": ("25M", (6e-5, 1.25e-4, 2.5e-4, 3.5e-4)),
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
            levels = {"size": size, "peak": f"{peak:f}".rstrip("0")}
            arms.append(s.Arm(levels, cfg, seeds=(1000,), twin="single"))
    return s.Study(
        name="order-tuning-lower",
        question="Which peak of the learning rate is best for one constant mixture?",
        arms=tuple(arms),
        outcomes=(s.Outcome("all", ("help", "udhr"), "all"),),
        primary="all",
        hypotheses=(),
    )
