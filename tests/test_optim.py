"""Schedules, the decay mask, and AdamW against a float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax import optim, presets
from gamayun_jax.config import OptimizerConfig, ScheduleConfig, UserError
from gamayun_jax.model import abstract_params


def rates(cfg, tokens, begin=0, end=1000):
    return np.array([float(optim.learning_rate(cfg, t, begin, end)) for t in tokens])


def test_wsd():
    cfg = ScheduleConfig("wsd", 2.0, 100, 200, floor=0.1)
    at = np.array([0, 50, 100, 500, 800, 900, 1000])
    expected = [0, 1, 2, 2, 2, 2 * (0.1 + 0.9 * 0.5), 0.2]
    np.testing.assert_allclose(rates(cfg, at), expected, rtol=1e-6)


def test_one_minus_sqrt_and_cosine():
    cfg = ScheduleConfig("wsd", 1.0, 0, 400, "1-sqrt")
    np.testing.assert_allclose(rates(cfg, [600, 700, 1000]), [1, 0.5, 0], atol=1e-6)
    cfg = ScheduleConfig("cosine", 1.0, 200)
    at = np.array([200, 600, 1000])
    np.testing.assert_allclose(rates(cfg, at), [1, 0.5, 0], atol=1e-6)


def test_position_global_or_restart():
    cfg = ScheduleConfig("wsd", 1.0, 100)
    assert rates(cfg, [1050], 1000, 2000)[0] == 1.0  # long past the warm-up
    again = ScheduleConfig("wsd", 1.0, 100, position="restart")
    np.testing.assert_allclose(rates(again, [1050], 1000, 2000), [0.5])


def test_schedule_that_does_not_fit():
    cfg = ScheduleConfig("wsd", 1.0, 600, 600)
    with pytest.raises(UserError, match="exceed"):
        optim.check_schedule(cfg, "stages.align.schedule", 0, 1000)
    optim.check_schedule(cfg, "stages.align.schedule", 0, 1200)


@pytest.mark.parametrize("preset", ["gamayun_1p5b", "llama3p2_1b", "qwen2p5_1p5b"])
def test_decay_mask_covers_every_parameter(preset):
    params = nn.unbox(abstract_params(getattr(presets, preset)()))
    mask = optim.decay_mask(params)
    flat = {
        optim.parameter_path(p): v
        for p, v in jax.tree_util.tree_flatten_with_path(mask)[0]
    }
    decayed = {k for k, v in flat.items() if v}
    assert decayed == {
        f"layers/{m}"
        for m in (
            "attention/q", "attention/k", "attention/v", "attention/o",
            "mlp/gate", "mlp/up", "mlp/down",
        )
    }  # fmt: skip


def test_decay_mask_refuses_an_unknown_parameter():
    with pytest.raises(UserError, match="neither"):
        optim.decay_mask({"mystery": jnp.zeros(3)})


def test_adamw_against_float64():
    cfg = OptimizerConfig(clip_norm=0.5, weight_decay=0.1)
    rng = np.random.default_rng(0)
    p = {"attention": {"q": rng.normal(size=(4, 3))}, "scale": rng.normal(size=5)}
    params = jax.tree.map(jnp.float32, p)
    optimizer = optim.make_optimizer(cfg)
    state = optimizer.init(params)
    m = jax.tree.map(np.zeros_like, p)
    v = jax.tree.map(np.zeros_like, p)
    for t in range(1, 6):
        g = jax.tree.map(lambda x: rng.normal(size=x.shape), p)
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        params = jax.tree.map(lambda a, u: a - 1e-2 * u, params, updates)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x: x * min(1, 0.5 / norm), g)
        m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
        v = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b * b, v, g)
        step = jax.tree.map(
            lambda a, b: (a / (1 - 0.9**t)) / (np.sqrt(b / (1 - 0.95**t)) + 1e-8), m, v
        )
        step["attention"]["q"] += 0.1 * p["attention"]["q"]
        p = jax.tree.map(lambda a, s: a - 1e-2 * s, p, step)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(p), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_the_learning_rate_is_not_in_the_optimizer_state():
    """A restored count must not be able to pin the rate of a second stage."""
    params = {"attention": {"q": jnp.ones((2, 2))}}
    state = optim.make_optimizer(OptimizerConfig()).init(params)
    shapes = {jnp.shape(x) for x in jax.tree.leaves(state)}
    scalars = [x for x in jax.tree.leaves(state) if jnp.shape(x) == ()]
    assert shapes == {(), (2, 2)}
    assert len(scalars) == 1  # Adam's own count, for the bias correction
