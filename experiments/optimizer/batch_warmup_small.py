"""As batch_warmup.py, for a model of 316k parameters: half as wide, at its own peak.

gamayun study experiments/optimizer/batch_warmup_small.py \
    --out experiments/optimizer/batch_warmup_small
"""

import dataclasses
from pathlib import Path

from gamayun_jax.study import design as s


def get_study() -> s.Study:
    here = Path(__file__).parent
    study, small = (
        s.load_study(here / name) for name in ("batch_warmup.py", "study_small.py")
    )
    (adamw,) = (a for a in small.arms if a.levels["optimizer"] == "adamw")
    return dataclasses.replace(
        study,
        name="batch-warmup-small",
        question="At 0.3M parameters and the same tokens, is AdamW better if its batch "
        "warms up?",
        arms=tuple(
            dataclasses.replace(
                arm,
                config=dataclasses.replace(
                    adamw.config, optimizer=arm.config.optimizer
                ),
            )
            for arm in study.arms
        ),
    )
