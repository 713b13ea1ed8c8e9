"""The exponential moving average of the parameters that a run keeps while it trains.

With p_t the parameters after update t = 1, 2, ... (skipped steps do not count), B the
tokens of a step and tau = optimizer.ema_tokens, the average a_t is

    a_t = a_(t-1) + s_t (p_t - a_(t-1)),  s_t = max(1 - exp(-B / tau), 9 / (t + 8))

The first share gives weights that fall by e every tau tokens, whatever the batch size
(the scaling rule of arXiv 2307.13813).

The second is larger while the average is young, up to 9 tau tokens: polynomial-decay
averaging (arXiv 1212.1824, eta = 8), which TensorFlow's ExponentialMovingAverage has as
a decay of min(d, (1 + n) / (10 + n)). It weighs p_k as k (k + 1) ... (k + 7), so the
window is about a ninth of what was trained on. Since s_1 = 1, the initial parameters
have no weight at all; the first half of the updates has 2**-9 together, so that the
warm-up of the learning rate is soon forgotten. Adam's correction, to start from 0 and
divide by 1 - d**t, leaves out the initial parameters too, but until tau tokens weighs
all updates about alike, those of the warm-up among them.

A difference is added, and not the sum of two products taken: d + (1 - d) is not 1 in
float32, and an average over 10,000 steps would be off by 1e-4 of its size. float32 in
turn drops what is below 6e-8 of the value that it is added to: with a tau of a million
steps the average would stand still.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from gamayun_jax.config import Config


def new_ema(params: Any) -> dict[str, Any]:
    """The average before its first update, which replaces it whole: zeros.

    Returns:
      `params`, as the parameters are, and `updates`, int32: how many it has taken.
    """
    return {"params": jax.tree.map(jnp.zeros_like, params), "updates": jnp.int32(0)}


def update_ema(
    ema: dict[str, Any], params: Any, cfg: Config, updates_of_step: int = 1
) -> dict[str, Any]:
    """The average with the parameters after one more update in it; see the module."""
    updates = ema["updates"] + 1
    tokens = cfg.tokens_per_step / updates_of_step
    least = -math.expm1(-tokens / cfg.optimizer.ema_tokens)
    share = jnp.maximum(least, 9 / (updates + 8))
    mixed = jax.tree.map(lambda a, p: a + share * (p - a), ema["params"], params)
    return {"params": mixed, "updates": updates}
