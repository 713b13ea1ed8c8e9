"""Facts stated in English alone, in the first half of a run.

    python experiments/facts/make_facts.py build/facts
    gamayun corpus build experiments/facts/config.py --out build/facts-corpus
    gamayun train experiments/facts/config.py --workdir runs/facts

The demo's text, model and length, one mixture throughout but for the facts: a tenth of
the first half, none of the second. The learning rate decays over the last fifth.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c

FACTS = "build/facts"
HALF = 489 * 16 * 128  # tokens
PEAK = 4e-3


def get_config() -> c.Config:
    base = c.load_config(Path(__file__).parents[1] / "tiny.py")
    corpus = dataclasses.replace(
        base.corpus,
        sources=(
            *(s for s in base.corpus.sources if s.name != "en/hq"),
            c.SourceConfig("en/facts", (f"{FACTS}/facts.jsonl",)),
        ),
    )

    def stage(name: str, facts: float, schedule: c.ScheduleConfig) -> c.StageConfig:
        shares = {"en/facts": facts, "en/help": 0.37 - facts}
        mixture = c.MixtureConfig("unimax", shares, max_epochs=20.0)
        return c.StageConfig(
            name, HALF, mixture, schedule, c.TokenWeightConfig("bytes")
        )

    warmup = HALF // 10
    decayed = c.ScheduleConfig(
        peak=PEAK, warmup_tokens=warmup, decay_tokens=2 * HALF // 5
    )
    return dataclasses.replace(
        base,
        name="facts",
        corpus=corpus,
        data=dataclasses.replace(base.data, corpus="build/facts-corpus"),
        stages=(
            stage("stated", 0.1, c.ScheduleConfig(peak=PEAK, warmup_tokens=warmup)),
            stage("silent", 0.0, decayed),
        ),
        evaluation=dataclasses.replace(
            base.evaluation,
            tasks=(f"{FACTS}/facts_river.yaml", f"{FACTS}/facts_goods.yaml"),
            tasks_every_steps=163,
        ),
    )
