"""Schedules, the decay mask, and AdamW against a float64 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import OptimizerConfig, ScheduleConfig, UserError
from gamayun_jax.model import presets
from gamayun_jax.model.weights import abstract_params, parameter_path
from gamayun_jax.training import optimizer as optim


def rates(cfg, tokens, begin=0, end=1000):
    return np.asarray(optim.learning_rate(cfg, np.float64(tokens), begin, end))


def reference(cfg, t, end):
    """The rate after t tokens of a schedule that ends at `end`, float64."""
    if cfg.kind == "wsd" and cfg.decay_shape == "linear":
        at = [0, cfg.warmup_tokens, end - cfg.decay_tokens, end]
        return np.interp(t, at, cfg.peak * np.array([0, 1, 1, cfg.floor]))
    if cfg.kind == "wsd":
        done = np.clip((t - (end - cfg.decay_tokens)) / cfg.decay_tokens, 0, 1)
        left = 1 - done**0.5
    else:
        done = np.clip((t - cfg.warmup_tokens) / (end - cfg.warmup_tokens), 0, 1)
        left = np.cos(np.pi * done / 2) ** 2
    rate = cfg.peak * (cfg.floor + (1 - cfg.floor) * left)
    return rate * np.minimum(1, t / cfg.warmup_tokens)


SHAPES = [("wsd", "linear"), ("wsd", "1-sqrt"), ("cosine", "linear")]


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@settings(max_examples=30, deadline=None)
@given(
    warmup=st.integers(1, 400_000),
    decay=st.integers(1, 600_000),
    floor=st.floats(0, 1),
    peak=st.floats(1e-5, 1.0),
    begin=st.integers(0, 10_000_000),
)
def test_schedules(kind, shape, warmup, decay, floor, peak, begin):
    """What they are, that they rise, stay and fall, and end at the floor."""
    end = 1_000_000
    cfg = ScheduleConfig(kind, peak, warmup, decay, shape, floor)
    t = np.sort(np.r_[np.linspace(0, end, 301), warmup, end - decay])
    got = rates(cfg, t, 0, end)
    # One ulp of 1e6 tokens in float32 is 1/16 of a token; 1-sqrt is steep at its start.
    tolerance = (0.1 / min(warmup, decay)) ** 0.5 if shape == "1-sqrt" else 1e-4
    np.testing.assert_allclose(got, reference(cfg, t, end), atol=peak * tolerance)
    assert (np.diff(got[t <= warmup]) >= 0).all()
    assert (np.diff(got[t >= warmup]) <= peak * 1e-6).all()
    after = rates(cfg, [end, end + 1000, 3 * end], 0, end)
    np.testing.assert_allclose(after, peak * floor, rtol=1e-5, atol=peak * 1e-6)
    # Counted from its stage's start, the same schedule is the same function.
    restarted = dataclasses.replace(cfg, position="restart")
    again = rates(restarted, t + begin, begin, begin + end)
    np.testing.assert_allclose(
        again, reference(cfg, np.float32(t + begin) - begin, end), atol=peak * tolerance
    )


def test_the_middle_of_a_decay_by_hand():
    cfg = ScheduleConfig("wsd", 2.0, 100, 200, floor=0.1)
    np.testing.assert_allclose(rates(cfg, [50, 900]), [1, 2 * (0.1 + 0.9 / 2)])
    cfg = ScheduleConfig("wsd", 1.0, 0, 400, "1-sqrt")
    np.testing.assert_allclose(rates(cfg, [600, 700, 1000]), [1, 0.5, 0], atol=1e-6)
    cfg = ScheduleConfig("cosine", 1.0, 200)
    np.testing.assert_allclose(rates(cfg, [200, 600]), [1, 0.5], atol=1e-6)


def test_without_a_decay_the_rate_stays():
    cfg = ScheduleConfig("wsd", 0.5, 100)
    np.testing.assert_array_equal(rates(cfg, [100, 700, 1000]), 0.5)
    no_warmup = ScheduleConfig("wsd", 0.5)
    np.testing.assert_array_equal(rates(no_warmup, [0, 1000]), 0.5)


def test_position_global_or_restart():
    cfg = ScheduleConfig("wsd", 1.0, 100)
    assert rates(cfg, [1050], 1000, 2000)[0] == 1.0  # long past the warm-up
    again = ScheduleConfig("wsd", 1.0, 100, position="restart")
    np.testing.assert_allclose(rates(again, [1050], 1000, 2000), [0.5])


@pytest.mark.parametrize("position", ["global", "restart"])
def test_trillions_of_tokens(position):
    """Token counts do not fit the int32 that JAX makes of an integer."""
    begin, end = 2 * 10**12, 25 * 10**11
    cfg = ScheduleConfig("wsd", 3e-4, 4 * 10**9, 10**11, position=position)
    rate = jax.jit(lambda t: optim.learning_rate(cfg, t, begin, end))
    restart = position == "restart"
    at = np.array([begin + 2e9, begin + 1e11, end - 5e10])
    wanted = 3e-4 * np.array([0.5 if restart else 1, 1, 0.5])
    np.testing.assert_allclose([rate(t) for t in at], wanted, rtol=1e-3)


def test_schedule_that_does_not_fit():
    cfg = ScheduleConfig("wsd", 1.0, 600, 600)
    with pytest.raises(UserError, match="exceed"):
        optim.check_schedule(cfg, "stages.align.schedule", 0, 1000)
    optim.check_schedule(cfg, "stages.align.schedule", 0, 1200)


PRESETS = ("gamayun_1p5b", "llama3p2_1b", "qwen2p5_1p5b", "qwen3_1p7b", "tiny")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_decay_mask_covers_every_parameter(preset, tied):
    """Matrices only: not the norms, which a scan over layers makes matrices too."""
    cfg = dataclasses.replace(getattr(presets, preset)(), tie_embeddings=tied)
    params = abstract_params(cfg)
    mask = optim.decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    flat = {
        parameter_path(p): v for p, v in jax.tree_util.tree_flatten_with_path(mask)[0]
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
    with pytest.raises(KeyError, match="mystery"):
        optim.decay_mask({"mystery": jnp.zeros(3)})


@pytest.mark.parametrize("clip", [0.5, 3.5, 100.0])  # always, sometimes, never
def test_adamw_against_float64(clip):
    """Clipped by the norm of all gradients; decay is scaled by the learning rate."""
    cfg = OptimizerConfig(clip_norm=clip, weight_decay=0.1)
    rng = np.random.default_rng(0)
    p = {"layers": {"attention": {"q": rng.normal(size=(4, 3))}}}
    p["final_norm"] = {"scale": rng.normal(size=5)}
    params = jax.tree.map(jnp.float32, p)
    optimizer = optim.make_optimizer(cfg)
    state = optimizer.init(params)
    m = jax.tree.map(np.zeros_like, p)
    v = jax.tree.map(np.zeros_like, p)
    for t in range(1, 6):
        rate = 1e-2 / t  # as the train step applies it: after the optimiser
        g = jax.tree.map(lambda x: rng.normal(size=x.shape), p)
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        params = jax.tree.map(lambda a, u, r=rate: a - r * u, params, updates)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x: x * min(1, clip / norm), g)
        m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
        v = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b * b, v, g)
        step = jax.tree.map(
            lambda a, b: (a / (1 - 0.9**t)) / (np.sqrt(b / (1 - 0.95**t)) + 1e-8), m, v
        )
        step["layers"]["attention"]["q"] += 0.1 * p["layers"]["attention"]["q"]
        p = jax.tree.map(lambda a, s, r=rate: a - r * s, p, step)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(p), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_the_learning_rate_is_not_in_the_optimizer_state():
    """A restored count must not be able to pin the rate of a second stage."""
    params = {"layers": {"attention": {"q": jnp.ones((2, 2))}}}
    state = optim.make_optimizer(OptimizerConfig()).init(params)
    shapes = {jnp.shape(x) for x in jax.tree.leaves(state)}
    scalars = [x for x in jax.tree.leaves(state) if jnp.shape(x) == ()]
    assert shapes == {(), (2, 2)}
    assert len(scalars) == 1  # Adam's own count, for the bias correction
