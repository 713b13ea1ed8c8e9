"""Stage 1 of the 1.5B run: balanced multilingual training, 2.0T tokens.

    gamayun corpus build experiments/stage1.py --out corpus
    gamayun curriculum experiments/stage1.py
    gamayun train experiments/stage1.py --workdir stage1     (on every host)

Hardware: a TPU pod slice; not run yet, so there are no expected numbers. The English
share (about 37 %) and the tokens of the two stages together (2.5T) are the paper's
(arXiv 2512.21580); the shape, the split into 2.0T + 0.5T, the schedule, the batch and
the sources are this project's choices (docs/design.md says from which precedents).

The sources below are an example of a layout: <data>/<language>/<domain>/*.jsonl.zst.
"""

from gamayun_jax import config as c
from gamayun_jax.model import presets

LANGUAGES = ("en", "ru", "de", "fr", "es", "it", "pt", "pl", "zh", "ja", "ko", "tr")
DATA = "data"
VOCAB = 131_072
SEQ_LEN = 4096
BATCH = 512  # 2.1M tokens
WARMUP = 2_000 * BATCH * SEQ_LEN


def corpus() -> c.CorpusConfig:
    """What both stages read: web and reference text, English of quality, code."""
    sources = [
        c.SourceConfig(f"{lang}/{domain}", (f"{DATA}/{lang}/{domain}/*.jsonl.zst",))
        for lang in LANGUAGES
        for domain in ("web", "reference")
    ]
    sources += [
        c.SourceConfig(f"en/{domain}", (f"{DATA}/en/{domain}/*.jsonl.zst",))
        for domain in ("hq", "stem", "code")
    ]
    heldout = c.HeldoutConfig(
        "parallel", {lang: f"{DATA}/heldout/{lang}.jsonl" for lang in LANGUAGES}
    )
    return c.CorpusConfig(
        sources=tuple(sources),
        heldout=(heldout,),
        tokenizer=c.TokenizerConfig(VOCAB, sample_bytes=4_000_000_000),
        record_tokens=SEQ_LEN,
        shard_bytes=1_000_000_000,
        min_chars=200,
    )


def get_config() -> c.Config:
    align = c.StageConfig(
        name="align",
        tokens=2_000_000_000_000,
        mixture=c.MixtureConfig(
            scheme="unimax",
            shares={
                "en/web": 0.33,
                "en/reference": 0.04,
                "en/hq": 0.0,
                "en/stem": 0.0,
                "en/code": 0.0,
            },
            max_epochs=4.0,
        ),
        schedule=c.ScheduleConfig(peak=3e-4, warmup_tokens=WARMUP),
        token_weights=c.TokenWeightConfig("bytes"),
    )
    return c.Config(
        name="gamayun-1.5b-stage1",
        languages=LANGUAGES,
        model=presets.gamayun_1p5b(),
        corpus=corpus(),
        data=c.DataConfig(
            corpus="corpus",
            seq_len=SEQ_LEN,
            batch_size=BATCH,
            block_examples=16_384,
            max_epochs=5.0,
        ),
        stages=(align,),
        # 10.2 of 16 GiB on v5e:16x16 (docs/plan.md), and 14 % less time than `full`.
        compute=c.ComputeConfig(remat="minimal", loss_chunk=512),
        # Weights divided over 16 chips, not all: their rows stay wide enough for a TPU
        # to gather and scatter, and 1 GiB of state a chip does not hurt.
        mesh=c.MeshConfig(data=-1, fsdp=16),
        checkpoint=c.CheckpointConfig(
            every_steps=1_000, keep=3, keep_every_steps=50_000
        ),
        evaluation=c.EvalConfig(every_steps=10_000, batch_size=256),
        log=c.LogConfig(every_steps=100),
    )
