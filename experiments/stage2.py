"""Stage 2 of the 1.5B run: high-quality English, 0.5T tokens, learning rate to 0.

    gamayun curriculum experiments/stage2.py --init-from stage1
    gamayun train experiments/stage2.py --workdir stage2 --init-from stage1

Hardware: a TPU pod slice; not run yet, so there are no expected numbers. The English
share (about 70 %, with STEM and code added) is the paper's (arXiv 2512.21580); the
rest are this project's choices. The other languages keep 30 % of the tokens, divided
as in stage 1.

Parameters, Adam's moments and each source's cursor go on from stage 1: no example
that stage 1 served comes again before its source is used up. The schedule counts
tokens from the start of stage 1, so its warm-up is over.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c

TOKENS = 500_000_000_000


def get_config() -> c.Config:
    first = c.load_config(Path(__file__).with_name("stage1.py"))
    enrich = c.StageConfig(
        name="enrich",
        tokens=TOKENS,
        mixture=c.MixtureConfig(
            scheme="unimax",
            shares={
                "en/web": 0.10,
                "en/reference": 0.05,
                "en/hq": 0.30,
                "en/stem": 0.13,
                "en/code": 0.12,
            },
            max_epochs=4.0,
        ),
        schedule=dataclasses.replace(first.stages[0].schedule, decay_tokens=TOKENS),
        token_weights=c.TokenWeightConfig("none"),
        transition=c.TransitionConfig(moments="keep", cursors="continue"),
    )
    return dataclasses.replace(first, name="gamayun-1.5b-stage2", stages=(enrich,))
