"""Two stages on the full Debian corpus, small enough for hundreds of runs.

    gamayun corpus debian --out build/debian
    gamayun corpus build experiments/order/config.py --out build/order-corpus

Stage `align` balances the languages, stage `enrich` raises English of quality to most
of the tokens, as in tiny.py; but the change is a step, and the learning rate is one
schedule over the run, so that data/controls.py can make twins of it. Each source is
read less than once.
"""

from gamayun_jax import config as c
from gamayun_jax.model import presets

LANGUAGES = ("en", "ru", "de", "fr", "es", "it", "pt", "pl", "zh", "ja", "ko", "tr")
DOMAINS = ("help", "docs", "man")  # descriptions are formulas, and all are parallel
DOCUMENTS = "build/debian"
VOCAB, LENGTH, BATCH = 4096, 256, 32
STEPS = 800
TOKENS = STEPS * LENGTH * BATCH
DECAY = TOKENS // 5  # of the learning rate: stage `enrich`


def files(language: str) -> tuple[str, ...]:
    """Paths of a language's documents; no Korean manual pages are in Debian."""
    domains = DOMAINS if language != "ko" else ("help", "docs")
    return tuple(f"{DOCUMENTS}/train/{language}.{d}.jsonl.zst" for d in domains)


def get_config() -> c.Config:
    balanced = c.MixtureConfig(
        scheme="unimax", shares={"en/text": 0.37, "en/hq": 0.0}, max_epochs=1.0
    )
    enriched = c.MixtureConfig(
        scheme="unimax", shares={"en/text": 0.25, "en/hq": 0.45}, max_epochs=1.0
    )
    schedule = {"peak": 3e-3, "warmup_tokens": TOKENS // 20}
    return c.Config(
        name="order",
        languages=LANGUAGES,
        model=presets.tiny(VOCAB),
        corpus=c.CorpusConfig(
            sources=(
                *(c.SourceConfig(f"{k}/text", files(k)) for k in LANGUAGES),
                c.SourceConfig("en/hq", (f"{DOCUMENTS}/train/en.hq.jsonl.zst",)),
            ),
            heldout=tuple(
                c.HeldoutConfig(
                    name,
                    {
                        k: f"{DOCUMENTS}/heldout/{prefix}{k}.jsonl.zst"
                        for k in LANGUAGES
                    },
                )
                for name, prefix in (("help", ""), ("udhr", "udhr."))
            ),
            tokenizer=c.TokenizerConfig(VOCAB, sample_bytes=20_000_000),
            record_tokens=LENGTH,
            shard_bytes=4_000_000,
        ),
        data=c.DataConfig(
            corpus="build/order-corpus",
            seq_len=LENGTH,
            batch_size=BATCH,
            block_examples=256,
            max_epochs=1.0,
            threads=1,
        ),
        stages=(
            c.StageConfig(
                name="align",
                tokens=TOKENS - DECAY,
                mixture=balanced,
                schedule=c.ScheduleConfig(**schedule),
                token_weights=c.TokenWeightConfig("bytes"),
            ),
            c.StageConfig(
                name="enrich",
                tokens=DECAY,
                mixture=enriched,
                schedule=c.ScheduleConfig(**schedule, decay_tokens=DECAY),
                token_weights=c.TokenWeightConfig("bytes"),
            ),
        ),
        checkpoint=c.CheckpointConfig(every_steps=16, keep_every_steps=16),
        compute=c.ComputeConfig(dtype="float32", scan_layers=False),
        evaluation=c.EvalConfig(batch_size=128, max_units=200),
        log=c.LogConfig(every_steps=40, tensorboard=False),
    )
