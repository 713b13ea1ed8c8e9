"""A published model continued in Russian and Turkish with English replayed.

    python -m recipes.smollm2 models/SmolLM2-135M-Instruct     (what to install: there)
    gamayun corpus build experiments/continue_smollm2.py --out build/smollm2-corpus
    gamayun train experiments/continue_smollm2.py --workdir runs/smollm2 \
        --init-from models/SmolLM2-135M-Instruct

Hardware: 2 CPU cores, no accelerator. Expected: see docs/continue.md.

SmolLM2-135M was made for English and knows little of other languages. Of 16,384 tokens
of software help Russian and Turkish get 35 % each and English 30 %: enough to see the
way work, far too little to teach a language.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c

SHARES = {"ru/help": 0.35, "tr/help": 0.35, "en/help": 0.3}
STEPS, BATCH, LENGTH = 16, 4, 256
STEP = BATCH * LENGTH  # tokens


def get_config() -> c.Config:
    demo = c.load_config(Path(__file__).with_name("tiny.py"))
    languages = ("en", "ru", "tr")
    stage = c.StageConfig(
        name="adapt",
        tokens=STEPS * STEP,
        mixture=c.MixtureConfig(shares=SHARES),
        schedule=c.ScheduleConfig(
            peak=2e-4, warmup_tokens=3 * STEP, decay_tokens=5 * STEP
        ),
    )
    corpus = dataclasses.replace(
        demo.corpus,
        sources=tuple(s for s in demo.corpus.sources if s.name in SHARES),
        heldout=tuple(
            c.HeldoutConfig(h.name, {k: h.files[k] for k in languages})
            for h in demo.corpus.heldout
        ),
        tokenizer=c.TokenizerConfig(model="models/SmolLM2-135M-Instruct"),
        record_tokens=LENGTH,
    )
    model = c.ModelConfig(
        vocab_size=49_152,
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_seq_len=8192,
        rope_theta=100_000.0,
        norm_eps=1e-5,
    )
    return dataclasses.replace(
        demo,
        name="smollm2-ru-tr",
        languages=languages,
        model=model,
        corpus=corpus,
        data=dataclasses.replace(
            demo.data,
            corpus="build/smollm2-corpus",
            seq_len=LENGTH,
            batch_size=BATCH,
            block_examples=16,
        ),
        stages=(stage,),
        compute=c.ComputeConfig(loss_chunk=128),
        evaluation=c.EvalConfig(batch_size=8, max_units=40),
        log=c.LogConfig(every_steps=2, tensorboard=False),
    )
