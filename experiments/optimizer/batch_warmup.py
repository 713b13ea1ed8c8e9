"""Is AdamW better after the same tokens if its batch warms up?

    gamayun corpus build experiments/tiny.py --out build/demo-corpus
    gamayun study experiments/optimizer/batch_warmup.py \
        --out experiments/optimizer/batch_warmup

Both arms are the AdamW of study.py, with the same examples in the same steps. One of
them makes several updates in a step at first: four rows each, not sixteen, and more
rows until a quarter of the tokens is seen.
"""

import dataclasses
from pathlib import Path

from gamayun_jax.study import design as s

ROWS, SHARE = 4, 0.25  # of the first update; of the tokens, in which it grows


def get_study() -> s.Study:
    study = s.load_study(Path(__file__).with_name("study.py"))
    (adamw,) = (a for a in study.arms if a.levels["optimizer"] == "adamw")
    (stage,) = adamw.config.stages
    warmed = dataclasses.replace(
        adamw.config.optimizer,
        first_batch_size=ROWS,
        batch_warmup_tokens=int(SHARE * stage.tokens),
    )
    configs = {
        "constant": adamw.config,
        "warmup": dataclasses.replace(adamw.config, optimizer=warmed),
    }
    return dataclasses.replace(
        study,
        name="batch-warmup",
        question="At 1M parameters and the same tokens, is AdamW better if its batch "
        "warms up?",
        arms=tuple(s.Arm({"batch": k}, v, seeds=(0, 1, 2)) for k, v in configs.items()),
        hypotheses=(
            s.Hypothesis(
                "warmup",
                "With a batch that warms up, a model is better on the same tokens.",
                better={"batch": "warmup"},
                than={"batch": "constant"},
            ),
        ),
        notes=(
            "The peak is the best for a constant batch, on a seed that is not used "
            "here; neither the first batch nor the length of the warm-up was tuned.",
        ),
    )
