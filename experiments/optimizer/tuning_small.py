"""As tuning.py, for a model of 316k parameters: half as wide.

gamayun study experiments/optimizer/tuning_small.py \
    --out experiments/optimizer/tuning_small
"""

import dataclasses
from pathlib import Path

from gamayun_jax.study import design as s


def get_study() -> s.Study:
    tuning = s.load_study(Path(__file__).with_name("tuning.py"))
    (first, *_) = tuning.arms
    model = dataclasses.replace(first.config.model, d_model=64, d_ff=192)
    return dataclasses.replace(
        tuning,
        name="optimizer-tuning-small",
        question="Which peak is best for each optimiser, in a smaller model?",
        arms=tuple(
            dataclasses.replace(a, config=dataclasses.replace(a.config, model=model))
            for a in tuning.arms
        ),
    )
