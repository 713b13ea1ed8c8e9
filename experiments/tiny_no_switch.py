"""The honest alternative to stage `enrich`: as many tokens without the switch.

    gamayun train experiments/tiny_no_switch.py --workdir runs/no-switch
    gamayun report runs/demo runs/no-switch --out runs/compared

The same as tiny.py (model, tokens, learning rate, seed), but the second stage keeps
the mixture of the first. What differs in the end is what the switch did.
"""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c


def get_config() -> c.Config:
    path = Path(__file__).with_name("tiny.py")
    cfg = c.load_config(path)
    align, enrich = cfg.stages
    same = dataclasses.replace(enrich, mixture=align.mixture)
    return dataclasses.replace(cfg, name="tiny-no-switch", stages=(align, same))
