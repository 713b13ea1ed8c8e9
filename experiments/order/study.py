"""Does the order of the data matter when every run serves the same examples?

    gamayun study experiments/order/study.py --out experiments/order --plan
    gamayun study experiments/order/study.py --out experiments/order --side-by-side 32

Align then enrich (config.py) against the same examples in another order: one constant
mixture, the stages reversed, a slide. Crossed with the learning rate at the end: a
decay to 0 over the last fifth, or a constant rate and the mean of the checkpoints of
that fifth. Three sizes of model; the peak of each was tuned on the single-phase arm
with another seed (tuning.py) and is the same in all its arms.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c
from gamayun_jax.study import design as s

# Size -> config, peak learning rate, seeds, orders.
SIZES = {
    "1M": ("config.py", 1.5e-3, 8, ("staged", "single", "reversed", "ramped")),
    "3M": ("config_3m.py", 1e-3, 4, ("staged", "single", "reversed")),
    "25M": ("config_25m.py", 5e-4, 4, ("staged", "single", "reversed")),
}


def with_rate(base: c.Config, peak: float, rate: str) -> c.Config:
    """The config with a peak, and with or without the decay at the end."""
    stages = []
    for stage in base.stages:
        decay = stage.schedule.decay_tokens if rate == "decay" else 0
        schedule = dataclasses.replace(stage.schedule, peak=peak, decay_tokens=decay)
        stages.append(dataclasses.replace(stage, schedule=schedule))
    return dataclasses.replace(base, stages=tuple(stages))


def get_study() -> s.Study:
    arms, hypotheses = [], []
    for size, (file, peak, seeds, orders) in SIZES.items():
        base = c.load_config(Path(__file__).with_name(file))
        for rate in ("decay", "average"):
            cfg = with_rate(base, peak, rate)
            window = cfg.stages[-1].tokens if rate == "average" else 0
            for order in orders:
                arms.append(
                    s.Arm(
                        {"size": size, "order": order, "rate": rate},
                        cfg,
                        seeds=tuple(range(seeds)),
                        twin="" if order == "staged" else order,
                        average_tokens=window,
                    )
                )
        decayed = {"size": size, "rate": "decay"}
        averaged = {"size": size, "rate": "average"}
        hypotheses += [
            s.Hypothesis(
                f"order, {size}",
                "Decayed, one constant mixture is better for the other languages than "
                "to align and then enrich: what trains while the rate decays counts "
                "most, and that is English.",
                better={**decayed, "order": "single"},
                than={**decayed, "order": "staged"},
            ),
            s.Hypothesis(
                f"constant rate, {size}",
                "The same at a constant rate with averaged checkpoints.",
                better={**averaged, "order": "single"},
                than={**averaged, "order": "staged"},
            ),
            s.Hypothesis(
                f"English, {size}",
                "Decayed, English is better when it is enriched last than when it is "
                "enriched first.",
                better={**decayed, "order": "staged"},
                than={**decayed, "order": "reversed"},
                outcome="English",
            ),
        ]
    return s.Study(
        name="order",
        question="At the same examples of every source, does it matter for the other "
        "languages whether English is enriched last, first or throughout?",
        arms=tuple(arms),
        outcomes=(
            s.Outcome("others", ("help", "udhr")),
            s.Outcome("others, in domain", ("help",)),
            s.Outcome("others, out of domain", ("udhr",)),
            s.Outcome("English", ("help", "udhr"), "en"),
            s.Outcome("English, in domain", ("help",), "en"),
            s.Outcome("English, out of domain", ("udhr",), "en"),
        ),
        primary="others",
        hypotheses=tuple(hypotheses),
        noise=0.027,
        worthwhile=0.02,
        exclusions="None but runs that diverge.",
        notes=(
            "The noise is that of a pilot with four seeds on the embedded corpus "
            "(853k parameters, 2.0M tokens); its arms and data are not in this study.",
            "The pilot saw align-then-enrich 0.05 worse for the other languages than "
            "one constant mixture, and its reverse as good: hence the hypotheses.",
        ),
    )
