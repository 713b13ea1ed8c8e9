"""Eight CPU devices, and no implicit rank promotion, for every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import tempfile

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile the same small steps again and again: share them within a session.
_CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

import dataclasses
from pathlib import Path

import pytest

from gamayun_jax import config as c
from gamayun_jax import corpus as corpus_module
from gamayun_jax import corpus_build

LANGUAGES = ("en", "ru", "tr")


def small_config(folder: Path) -> c.Config:
    """Two stages on three languages of the embedded corpus: seconds on a CPU."""
    demo = c.DEMO_CORPUS
    mixture = c.MixtureConfig("explicit", {"en/help": 0.4, "ru/help": 0.4, "tr/*": 0.2})
    enriched = c.MixtureConfig(
        "natural", {"en/help": 0.6}, ramp="linear", ramp_tokens=4 * 64 * 2
    )
    return c.Config(
        name="small",
        languages=LANGUAGES,
        model=c.ModelConfig(
            vocab_size=512,
            num_layers=2,
            d_model=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            d_ff=64,
            max_seq_len=64,
            qk_norm=True,
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
            corpus=str(folder), seq_len=64, batch_size=8, block_examples=32, threads=1
        ),
        stages=(
            c.StageConfig(
                "align",
                7 * 8 * 64,
                mixture,
                c.ScheduleConfig(peak=3e-3, warmup_tokens=2 * 8 * 64),
                c.TokenWeightConfig("bytes"),
            ),
            c.StageConfig(
                "enrich",
                6 * 8 * 64,
                enriched,
                c.ScheduleConfig(
                    peak=3e-3, warmup_tokens=2 * 8 * 64, decay_tokens=6 * 8 * 64
                ),
                c.TokenWeightConfig("none"),
                c.TransitionConfig(moments="reset"),
            ),
        ),
        checkpoint=c.CheckpointConfig(every_steps=3, keep=20),
        evaluation=c.EvalConfig(batch_size=8, max_units=10),
        log=c.LogConfig(every_steps=4, tensorboard=False),
    )


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> c.Config:
    """`small_config` with its corpus built."""
    cfg = small_config(tmp_path_factory.mktemp("corpus") / "corpus")
    corpus_build.build(cfg, Path(cfg.data.corpus), workers=1, progress=False)
    return cfg


@pytest.fixture(scope="session")
def corpus(config: c.Config) -> corpus_module.Corpus:
    return corpus_module.open_corpus(Path(config.data.corpus))


@pytest.fixture
def replace():
    """dataclasses.replace through a dotted path: replace(cfg, "data.seq_len", 32)."""

    def set_path(obj, path, value):
        name, _, rest = path.partition(".")
        new = set_path(getattr(obj, name), rest, value) if rest else value
        return dataclasses.replace(obj, **{name: new})

    return set_path
