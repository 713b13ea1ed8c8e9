"""A run of both stages that takes seconds: what the fault tests interrupt."""

from gamayun_jax import config as c

LANGUAGES = ("en", "ru", "tr")
STEP = 4 * 32  # tokens


def get_config() -> c.Config:
    demo = c.DEMO_CORPUS
    return c.Config(
        name="faults",
        languages=LANGUAGES,
        model=c.ModelConfig(
            vocab_size=512, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1,
            head_dim=8, d_ff=32, max_seq_len=32, qk_norm=True,
        ),
        corpus=c.CorpusConfig(
            sources=tuple(
                c.SourceConfig(f"{k}/help", (str(demo / f"train/{k}.help.jsonl.zst"),))
                for k in LANGUAGES
            ),
            heldout=(
                c.HeldoutConfig(
                    "udhr",
                    {k: str(demo / f"heldout/udhr.{k}.jsonl.zst") for k in LANGUAGES},
                ),
            ),
            tokenizer=c.TokenizerConfig(512, sample_bytes=200_000),
            record_tokens=64,
            shard_bytes=400_000,
        ),
        data=c.DataConfig(
            corpus="build/faults-corpus", seq_len=32, batch_size=4, block_examples=16,
            threads=1,
        ),
        stages=(
            c.StageConfig(
                "align",
                130 * STEP,
                c.MixtureConfig(
                    "explicit", {"en/help": 0.4, "ru/help": 0.4, "tr/*": 0.2}
                ),
                c.ScheduleConfig(peak=3e-3, warmup_tokens=10 * STEP),
                c.TokenWeightConfig("bytes"),
            ),
            c.StageConfig(
                "enrich",
                110 * STEP,
                c.MixtureConfig(
                    "natural", {"en/help": 0.6}, ramp="linear", ramp_tokens=20 * STEP
                ),
                c.ScheduleConfig(
                    peak=3e-3, warmup_tokens=10 * STEP, decay_tokens=110 * STEP
                ),
                transition=c.TransitionConfig(moments="reset"),
            ),
        ),
        optimizer=c.OptimizerConfig(ema_tokens=8 * STEP),
        checkpoint=c.CheckpointConfig(every_steps=2, keep=3, keep_every_steps=50),
        evaluation=c.EvalConfig(every_steps=20, batch_size=8, max_units=4),
        log=c.LogConfig(every_steps=5, tensorboard=False),
    )  # fmt: skip
