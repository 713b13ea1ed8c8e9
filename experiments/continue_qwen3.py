"""Qwen3-1.7B-Base continued in the 12 languages, with English replayed: 100B tokens.

    gamayun tokenizer report CORPUS --model models/Qwen3-1.7B-Base
    gamayun corpus build experiments/continue_qwen3.py --out corpus-qwen3
    gamayun train experiments/continue_qwen3.py --workdir continued-qwen3 \\
        --init-from models/Qwen3-1.7B-Base               (on every host)

Hardware: a TPU pod slice; not run, so there are no expected numbers: the config was
loaded, its curriculum planned and its parameters counted. models/ holds the published
folder (config.json, safetensors, tokenizer.json).

Sources as in stage1.py. Stage `adapt` gives a quarter of the tokens to English, so that
it is not forgotten, and divides the rest evenly among the other languages; stage
`anneal` raises text of quality while the learning rate decays. The rate is warmed up
again to a third of what the 1.5B run has: higher, it adapts and forgets faster (Ibrahim
et al. 2024, arXiv 2403.08763, who also replay). All numbers are this project's choices;
docs/continue.md says what to look at.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.model import presets

MODEL = "models/Qwen3-1.7B-Base"
BATCH = 256  # 1.0M tokens
ADAPT, ANNEAL = 80_000_000_000, 20_000_000_000
PEAK = 1e-4


def get_config() -> c.Config:
    first = c.load_config(Path(__file__).with_name("stage1.py"))
    warmup = 1_000 * BATCH * first.data.seq_len
    adapt = c.StageConfig(
        name="adapt",
        tokens=ADAPT,
        mixture=c.MixtureConfig(
            scheme="unimax",
            shares={
                "en/web": 0.12,
                "en/reference": 0.03,
                "en/hq": 0.05,
                "en/stem": 0.02,
                "en/code": 0.03,
            },
            max_epochs=4.0,
        ),
        schedule=c.ScheduleConfig(peak=PEAK, warmup_tokens=warmup),
    )
    anneal = c.StageConfig(
        name="anneal",
        tokens=ANNEAL,
        mixture=c.MixtureConfig(
            scheme="unimax",
            shares={
                "en/web": 0.03,
                "en/reference": 0.04,
                "en/hq": 0.14,
                "en/stem": 0.05,
                "en/code": 0.04,
            },
            max_epochs=4.0,
            ramp="linear",
            ramp_tokens=ANNEAL // 10,
        ),
        schedule=c.ScheduleConfig(peak=PEAK, warmup_tokens=warmup, decay_tokens=ANNEAL),
    )
    tokenizer = c.TokenizerConfig(model=MODEL)
    return dataclasses.replace(
        first,
        name="continue-qwen3",
        model=presets.qwen3_1p7b(),
        corpus=dataclasses.replace(first.corpus, tokenizer=tokenizer),
        data=dataclasses.replace(
            first.data, corpus="corpus-qwen3", batch_size=BATCH, block_examples=8192
        ),
        stages=(adapt, anneal),
        evaluation=c.EvalConfig(every_steps=5_000, batch_size=256),
    )
