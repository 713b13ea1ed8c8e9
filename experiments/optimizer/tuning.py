"""The learning rate of each optimiser, tuned on a seed that the study does not use.

gamayun corpus build experiments/tiny.py --out build/demo-corpus
gamayun study experiments/optimizer/tuning.py --out experiments/optimizer/tuning
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s

TOKENS = 320 * 16 * 128
SHARES = {"en": 0.37}  # and the rest evenly
PEAKS = (2e-3, 4e-3, 8e-3)


def config_of(kind: str, peak: float) -> c.Config:
    """The demo's model and batch in one stage of a third as many tokens."""
    base = c.load_config(Path(__file__).parents[1] / "tiny.py")
    others = [k for k in base.languages if k not in SHARES]
    rest = (1 - sum(SHARES.values())) / len(others)
    shares = {f"{k}/help": SHARES.get(k, rest) for k in base.languages}
    schedule = c.ScheduleConfig(
        peak=peak, warmup_tokens=TOKENS // 20, decay_tokens=TOKENS // 5
    )
    stage = c.StageConfig("all", TOKENS, c.MixtureConfig("explicit", shares), schedule)
    return dataclasses.replace(base, stages=(stage,), optimizer=c.OptimizerConfig(kind))


def get_study() -> s.Study:
    return s.Study(
        name="optimizer-tuning",
        question="Which peak of the learning rate is best for AdamW, and for Muon?",
        arms=tuple(
            s.Arm(
                {"optimizer": kind, "peak": f"{peak:g}"},
                config_of(kind, peak),
                seeds=(1000,),
            )
            for kind in ("adamw", "muon")
            for peak in PEAKS
        ),
        outcomes=(s.Outcome("all", ("help", "udhr"), "all"),),
        primary="all",
        hypotheses=(),
        matched=None,
    )
