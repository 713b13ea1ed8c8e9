"""As study.py, for a model of 316k parameters: half as wide.

gamayun study experiments/optimizer/study_small.py --out experiments/optimizer/small
"""

import dataclasses
from pathlib import Path

from gamayun_jax.study import design as s

# The best of tuning_small.py and tuning_small_higher.py.
BEST = {"adamw-0.008": "tuning_small.py", "muon-0.016": "tuning_small_higher.py"}


def get_study() -> s.Study:
    here = Path(__file__).parent
    study = s.load_study(here / "study.py")
    best = []
    for name, file in BEST.items():
        (arm,) = (a for a in s.load_study(here / file).arms if a.name == name)
        levels = {"optimizer": arm.levels["optimizer"]}
        best.append(s.Arm(levels, arm.config, seeds=(0, 1, 2)))
    return dataclasses.replace(
        study,
        name="optimizer-small",
        question="At 0.3M parameters and the same tokens, is Muon better than AdamW?",
        arms=tuple(best),
        notes=(
            "The peak of each optimiser is the best of four on a seed that is not used "
            "here (tuning_small.py, tuning_small_higher.py); Muon's is the highest of "
            "them. Nothing else was tuned.",
        ),
    )
