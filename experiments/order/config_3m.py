"""The runs of config.py with a model of 3.4M parameters."""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c


def get_config() -> c.Config:
    base = c.load_config(Path(__file__).with_name("config.py"))
    model = dataclasses.replace(
        base.model, num_layers=6, d_model=192, num_heads=3, d_ff=576
    )
    return dataclasses.replace(base, name="order-3m", model=model)
