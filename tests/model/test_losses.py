"""Weights and loss against float64, and equal under any way to cut the batch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gamayun_jax.model.loss import (
    TokenWeights,
    head_loss,
    token_weights,
    weighted_loss,
)
from gamayun_jax.training import step

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
        return head_loss(x, w, targets, jnp.float32(weights), z, chunk, "float32")

    (value, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        jnp.float32(x), jnp.float32(w)
    )
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(nll, want[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[0], want[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], want[3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss(jnp.float32(x), jnp.float32(w))[0], want[0], 1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_gradients_equal_those_of_a_naive_loss(chunk):
    """Also where the loss is scaled, and with nll as a metric that has no gradient."""
    x, w, targets, weights = case(1)
    weights, z = jnp.float32(weights), 0.01

    def ours(x, w):
        loss, nll = head_loss(x, w, targets, weights, z, chunk, "float32")
        return 0.25 * loss + jnp.sum(nll)

    def naive(x, w):
        logits = jnp.einsum("btd,vd->btv", x, w)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = -jnp.take_along_axis(
            jax.nn.log_softmax(logits), targets[..., None], axis=-1
        )[..., 0]
        return 0.25 * jnp.sum(weights * (nll + z * lse**2))

    args = (jnp.float32(x), jnp.float32(w))
    pairs = zip(
        jax.jit(jax.grad(ours, (0, 1)))(*args),
        jax.jit(jax.grad(naive, (0, 1)))(*args),
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_token_s_weight_is_the_product_and_zero_where_invalid(random_batch):
    batch = random_batch(B, T, V)
    tables = TokenWeights(np.float32([1, 2, 3]), np.linspace(0, 2, V, dtype=np.float32))
    got = token_weights(batch, tables)
    want = tables.language[batch["language"]] * tables.token[batch["targets"]]
    np.testing.assert_allclose(got, want * batch["loss_mask"], rtol=1e-6)


@pytest.mark.parametrize(
    "cuts",
    [
        [np.s_[:1], np.s_[1:]],
        [np.s_[:, :5], np.s_[:, 5:]],
        [np.s_[:2, :3], np.s_[:2, 3:], np.s_[2:, :3], np.s_[2:, 3:]],
    ],
)
def test_sums_add_over_any_split_of_the_batch(cuts, random_batch):
    x, w, *_ = case()
    batch = random_batch(B, T, V)
    tables = TokenWeights(np.float32([1, 2, 3]), np.ones(V, np.float32))

    def sums(cut):
        part = {k: v[cut] for k, v in batch.items()}
        return weighted_loss(jnp.float32(x[cut]), jnp.float32(w), part, tables)[1]

    whole, added = sums(np.s_[:]), jax.tree.map(lambda *a: sum(a), *map(sums, cuts))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(added), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    _, nll, *_ = reference(x, w, batch["targets"], batch["loss_mask"], 0)
    for i in range(3):
        of_language = batch["language"] == i
        found = [whole["languages"][k][i] for k in ("nll", "targets", "tokens")]
        wanted = (nll * batch["loss_mask"], batch["loss_mask"], np.ones((B, T)))
        np.testing.assert_allclose(
            found, [(a * of_language).sum() for a in wanted], rtol=1e-5
        )
    assert whole["target_count"] == batch["loss_mask"].sum()
    weights = batch["loss_mask"] * tables.language[batch["language"]]
    found = [whole["languages"]["weights"], whole["squared_weights"]]
    of_language = [(weights * (batch["language"] == i)).sum() for i in range(3)]
    np.testing.assert_allclose(found[0], of_language, rtol=1e-5)
    np.testing.assert_allclose(found[1], (weights**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(whole["loss_sum"], (weights * nll).sum(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 3])
def test_measuring_the_weights_changes_no_bit(
    wide_config, new_states, random_batch, monkeypatch, microbatches
):
    """Of loss, norm and state after two steps, against steps that do not."""
    compute = dataclasses.replace(wide_config.compute, microbatches=microbatches)
    cfg = dataclasses.replace(wide_config, compute=compute)
    batch = random_batch(cfg.data.batch_size, cfg.data.seq_len, cfg.model.vocab_size)
    tables = TokenWeights(
        np.float32([0.5, 1, 2]), np.linspace(0, 2, cfg.model.vocab_size, dtype="f4")
    )

    def two_steps():
        update = jax.jit(lambda state: step.update(state, batch, cfg, tables, 1e-2))
        state, first = update(new_states[-1])
        state, second = update(state)
        kept = ("loss_sum", "grad_norm", "target_count")
        return state, [{k: m[k] for k in kept} for m in (first, second)]

    def unmeasured(*args):
        loss_sum, sums = weighted_loss(*args)
        languages = {k: v for k, v in sums["languages"].items() if k != "weights"}
        rest = {k: v for k, v in sums.items() if k != "squared_weights"}
        return loss_sum, {**rest, "languages": languages}

    measured = two_steps()
    monkeypatch.setattr(step, "weighted_loss", unmeasured)
    jax.tree.map(np.testing.assert_array_equal, measured, two_steps())


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [
        ((1, 1, 1), 3),
        ((2, 2, 2), 1),
        ((8, 1, 1), 1),
        ((1, 8, 1), 1),
        ((1, 1, 8), 1),
        ((4, 2, 1), 3),
    ],
)
def test_any_sharding_and_microbatching_gives_the_same(
    gradients_on, sizes, microbatches
):
    alone, found = gradients_on((1, 1, 1)), gradients_on(sizes, microbatches)
    assert found.sums["target_count"] == alone.sums["target_count"]
    leaves = zip(jax.tree.leaves(alone[:2]), jax.tree.leaves(found[:2]), strict=True)
    for a, b in leaves:
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


@pytest.mark.parametrize(
    ("reduce_dtype", "least", "most"),
    [("float32", 0, 1e-3), ("bfloat16", 2e-3, 2e-2)],
)
def test_in_bfloat16_chunks_add_the_head_s_gradient_in_the_dtype_asked_for(
    reduce_dtype, least, most
):
    """64 chunks against float64; the states have a mean, as a model's do."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 1, (4, 512, D)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(V, D)), jnp.bfloat16).astype(jnp.float32)
    targets = rng.integers(0, V, (4, 512)).astype(np.int32)
    weights = rng.random((4, 512)).astype(np.float32)
    want = reference(np.float64(x), np.float64(w), targets, weights, 0.0)[3]

    def loss(w):
        return head_loss(x, w, targets, jnp.asarray(weights), 0.0, 8, reduce_dtype)[0]

    got = jax.jit(jax.grad(loss))(w)
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert least <= error <= most


def test_no_sum_is_a_product_whose_factors_a_tpu_rounds(random_batch):
    """A TPU rounds float32 factors to bfloat16 where no precision is named. So the
    program as lowered for one is read: products may have bfloat16 factors only."""
    x, w, *_ = case()
    tables = TokenWeights(np.float32([1, 2, 3]), np.ones(V, np.float32))
    batch = {k: jnp.asarray(v) for k, v in random_batch(B, T, V).items()}

    def loss(x, w):
        return weighted_loss(x, w, batch, tables, chunk=4)

    args = (jnp.asarray(x, jnp.bfloat16), jnp.float32(w))
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    text = gradient.trace(*args).lower(lowering_platforms=("tpu",))
    products = re.findall(r"dot_general .*: \((.*)\) ->", text.as_text())
    assert len(products) == 3
    assert not [factors for factors in products if "f32>" in factors]
