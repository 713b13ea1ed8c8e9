"""A small model continued in three languages with English replayed: a minute or two.

    gamayun export-hf runs/demo build/demo-model         (a model as others publish it)
    gamayun corpus build experiments/continue_tiny.py --out build/continue-corpus
    gamayun train experiments/continue_tiny.py --workdir runs/continued \
        --init-from build/demo-model

Hardware: 2 CPU cores, no accelerator. Expected: see docs/continue.md.

The model is the demo's, which knows twelve languages a little; here Polish, Korean and
Turkish get a quarter of the tokens each, English the last one.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c

TOKENS = 400_000
FOCUS = ("pl", "ko", "tr")


def get_config() -> c.Config:
    demo = c.load_config(Path(__file__).with_name("tiny.py"))
    mixture = c.MixtureConfig(
        shares={f"{lang}/help": 0.25 for lang in (*FOCUS, "en")} | {"en/hq": 0.0},
        max_epochs=20.0,
    )
    stage = c.StageConfig(
        name="adapt",
        tokens=TOKENS,
        mixture=mixture,
        schedule=c.ScheduleConfig(
            peak=1e-3, warmup_tokens=TOKENS // 20, decay_tokens=TOKENS // 2
        ),
    )
    tokenizer = c.TokenizerConfig(model="build/demo-model")
    return dataclasses.replace(
        demo,
        name="continue-tiny",
        corpus=dataclasses.replace(demo.corpus, tokenizer=tokenizer),
        data=dataclasses.replace(demo.data, corpus="build/continue-corpus"),
        stages=(stage,),
    )
