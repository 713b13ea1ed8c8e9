"""The runs of config.py with a model of 27M parameters, in bfloat16."""

import dataclasses
from pathlib import Path

from gamayun_jax import config as c


def get_config() -> c.Config:
    base = c.load_config(Path(__file__).with_name("config.py"))
    model = dataclasses.replace(
        base.model, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4, d_ff=1536
    )
    compute = c.ComputeConfig(dtype="bfloat16")
    return dataclasses.replace(base, name="order-25m", model=model, compute=compute)
