"""Is Muon better than AdamW after the same tokens?

    gamayun corpus build experiments/tiny.py --out build/demo-corpus
    gamayun study experiments/optimizer/study.py --out experiments/optimizer

The demo's model in one stage of a third as many tokens, the same examples in both arms.
"""

from pathlib import Path

from gamayun_jax.study import design as s

PEAKS = {"adamw": 2e-3, "muon": 4e-3}  # the best of tuning.py and tuning_lower.py


def get_study() -> s.Study:
    tuning = s.load_study(Path(__file__).with_name("tuning.py"))
    configs = {a.name: a.config for a in tuning.arms}
    return s.Study(
        name="optimizer",
        question="At 1M parameters and the same tokens, is Muon better than AdamW?",
        arms=tuple(
            s.Arm({"optimizer": k}, configs[f"{k}-{peak:g}"], seeds=(0, 1, 2))
            for k, peak in PEAKS.items()
        ),
        outcomes=(
            s.Outcome("all", ("help", "udhr"), "all"),
            s.Outcome("help", ("help",), "all"),
            s.Outcome("udhr", ("udhr",), "all"),
        ),
        primary="all",
        hypotheses=(
            s.Hypothesis(
                "muon",
                "Trained by Muon, a model is better than by AdamW on the same tokens.",
                better={"optimizer": "muon"},
                than={"optimizer": "adamw"},
            ),
        ),
        worthwhile=0.02,
        notes=(
            "The peak of each optimiser is the best on a seed that is not used here, "
            "of five for AdamW and three for Muon (tuning.py, tuning_lower.py); "
            "nothing else was tuned.",
        ),
    )
