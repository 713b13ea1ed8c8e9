"""The study beside this file on a fifth of the tokens, with a seed more.

gamayun study experiments/shuffled/short.py --out experiments/shuffled/short
"""

import runpy
from pathlib import Path

from gamayun_jax.study import design as s


def get_study() -> s.Study:
    study = runpy.run_path(str(Path(__file__).with_name("study.py")))
    return study["get_study"](part=5, seeds=(0, 1, 2, 3))
