"""Weights and loss against float64, and equal under any way to cut the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax import sharding
from gamayun_jax.config import MeshConfig, TokenWeightConfig, UserError
from gamayun_jax.losses import (
    TokenWeights,
    head_loss,
    make_token_weights,
    token_weights,
    weighted_loss,
)
from gamayun_jax.step import gradient_sums, new_state

B, T, D, V = 4, 12, 8, 17
LANGUAGES = ("en", "ru", "tr")


def case(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, T, D)),
        rng.normal(size=(V, D)),
        rng.integers(0, V, (B, T)).astype(np.int32),
        rng.random((B, T)) * (rng.random((B, T)) > 0.3),
    )


def reference(x, w, targets, weights, z):
    """Loss, nll and gradients in float64."""
    logits = np.einsum("btd,vd->btv", x, w)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    probs = np.exp(logits - lse[..., None])
    d = probs * (1 + 2 * z * lse)[..., None] - np.eye(V)[targets]
    d *= weights[..., None]
    loss = (weights * (nll + z * lse**2)).sum()
    return loss, nll, np.einsum("btv,vd->btd", d, w), np.einsum("btv,btd->vd", d, x)


@pytest.mark.parametrize("chunk", [0, 3, 12])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_head_loss_and_gradients(chunk, z):
    x, w, targets, weights = case()
    want = reference(x, w, targets, weights, z)

    def loss(x, w):
        return head_loss(x, w, targets, jnp.float32(weights), z, chunk)

    (value, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        jnp.float32(x), jnp.float32(w)
    )
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(nll, want[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[0], want[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], want[3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss(jnp.float32(x), jnp.float32(w))[0], want[0], 1e-5)


def test_a_chunk_that_does_not_divide():
    x, w, targets, weights = case()
    with pytest.raises(UserError, match="does not divide"):
        head_loss(x, w, targets, weights, 0.0, 5)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    shape = (B, T)
    return {
        "inputs": rng.integers(0, V, shape).astype(np.int32),
        "targets": rng.integers(0, V, shape).astype(np.int32),
        "language": np.repeat(rng.integers(0, 3, (B, 1)), T, 1).astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "valid": (rng.random(shape) > 0.2).astype(np.float32),
    }


positive = st.floats(0.01, 1.0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(positive, min_size=3, max_size=3),
    st.lists(positive, min_size=3, max_size=3),
)
def test_language_weights_have_mean_one_under_the_mixture(weights, shares):
    q = np.array(shares) / sum(shares)
    given_weights = dict(zip(LANGUAGES, weights, strict=True))
    sampled = dict(zip(LANGUAGES, q.tolist(), strict=True))
    static = make_token_weights(
        TokenWeightConfig("static", given_weights), LANGUAGES, V, sampled
    )
    assert q @ static.language == pytest.approx(1, rel=1e-5)
    ratio = static.language / np.array(weights)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    target = make_token_weights(
        TokenWeightConfig("target_share", given_weights), LANGUAGES, V, sampled
    )
    # The objective's shares are the configured ones, whatever is sampled.
    np.testing.assert_allclose(
        q * target.language, np.array(weights) / sum(weights), rtol=1e-5
    )


def test_byte_weights():
    lengths = np.arange(V)
    q = {"en": 0.5, "ru": 0.5, "tr": 0.0}
    found = make_token_weights(
        TokenWeightConfig("bytes"), LANGUAGES, V, q, lengths, {"en": 4.0, "ru": 6.0}
    )
    np.testing.assert_allclose(found.token, lengths / 5.0, rtol=1e-6)
    np.testing.assert_array_equal(found.language, 1)


def test_a_token_s_weight_is_the_product_and_zero_where_invalid():
    batch = batch_of()
    tables = TokenWeights(np.float32([1, 2, 3]), np.linspace(0, 2, V, dtype=np.float32))
    got = token_weights(batch, tables)
    want = tables.language[batch["language"]] * tables.token[batch["targets"]]
    np.testing.assert_allclose(got, want * batch["valid"], rtol=1e-6)


def test_weights_that_cannot_be():
    q = {"en": 1.0}
    one = TokenWeightConfig("target_share", {"en": 0.5, "ru": 0.5, "tr": 0.0})
    with pytest.raises(UserError, match="'ru' 0.5 of the objective"):
        make_token_weights(one, LANGUAGES, V, q)
    none = TokenWeightConfig("static", dict.fromkeys(LANGUAGES, 0.0))
    with pytest.raises(UserError, match="no token would train"):
        make_token_weights(none, LANGUAGES, V, q)


def test_sums_add_over_any_split_of_the_batch():
    x, w, *_ = case()
    batch = batch_of()
    tables = TokenWeights(np.float32([1, 2, 3]), np.ones(V, np.float32))
    whole = weighted_loss(jnp.float32(x), jnp.float32(w), batch, tables)[1]
    parts = [
        weighted_loss(
            jnp.float32(x[rows]), jnp.float32(w),
            {k: v[rows] for k, v in batch.items()}, tables,
        )[1]
        for rows in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    added = jax.tree.map(jnp.add, *parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(added), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert whole["languages"]["tokens"].sum() == B * T
    assert whole["languages"]["targets"].sum() == batch["valid"].sum()


def gradients(config, mesh_config, microbatches, devices=None):
    """Sums and gradients of one batch of the small config's model under a mesh."""
    cfg = dataclasses.replace(
        config,
        mesh=mesh_config,
        model=dataclasses.replace(config.model, vocab_size=512, num_kv_heads=2),
        compute=dataclasses.replace(config.compute, microbatches=microbatches),
    )
    rng = np.random.default_rng(1)
    shape = (8, 16)
    batch = {
        "inputs": rng.integers(0, 512, shape).astype(np.int32),
        "targets": rng.integers(0, 512, shape).astype(np.int32),
        "language": np.repeat(rng.integers(0, 3, (8, 1)), 16, 1).astype(np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "valid": (rng.random(shape) > 0.5).astype(np.float32),
    }
    tables = TokenWeights(np.float32([1, 2, 3]), np.ones(512, np.float32))
    mesh = sharding.make_mesh(mesh_config, devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        state = new_state(cfg, mesh)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        step = jax.jit(lambda p, b: gradient_sums(p, b, cfg, tables))
        return jax.device_get(step(state.params, batch))


@pytest.fixture(scope="module")
def one_device(config):
    return gradients(config, MeshConfig(1, 1, 1), 1, jax.devices()[:1])


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        ((2, 2, 2), 1),
        ((8, 1, 1), 1),
        ((1, 8, 1), 1),
        ((4, 1, 2), 2),
        ((1, 4, 2), 2),
    ],
)
def test_any_sharding_and_microbatching_gives_the_same(
    config, one_device, mesh, microbatches
):
    found = gradients(config, MeshConfig(*mesh), microbatches)
    for a, b in zip(jax.tree.leaves(one_device), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
