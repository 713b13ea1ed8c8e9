"""The decoder against a float64 reference in NumPy, and its invariances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax import presets
from gamayun_jax.config import ComputeConfig, ModelConfig, RopeScaling, UserError
from gamayun_jax.model import (
    Transformer,
    flops_per_token,
    init_cache,
    logits,
    parameter_count,
    rope_frequencies,
)

SMALL = ModelConfig(
    vocab_size=61, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=6,
    d_ff=40, max_seq_len=64,
)  # fmt: skip
VARIANTS = {
    "gamayun": dataclasses.replace(SMALL, qk_norm=True),
    "llama": dataclasses.replace(
        SMALL, rope_theta=100.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
        num_kv_heads=1,
    ),
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, num_kv_heads=4),
    "untied": dataclasses.replace(SMALL, tie_embeddings=False),
}  # fmt: skip
FLOAT32 = ComputeConfig(dtype="float32")


def make(cfg, compute=FLOAT32, seed=0):
    """Model and parameters, all of them random (norms and biases too)."""
    one = jnp.zeros((1, 1), jnp.int32)
    model = Transformer(cfg, compute)
    params = nn.unbox(model.init(jax.random.key(seed), one, one, one))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        x + 0.1 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return model, jax.tree.unflatten(tree, noisy)


def inputs(cfg, B=2, T=20, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return tokens, positions, np.ones((B, T), np.int32)


def run(model, params, *args):
    x_BTD, _ = jax.jit(lambda p, *a: model.apply({"params": p}, *a))(params, *args)
    return np.asarray(logits(params, x_BTD))


def reference(cfg, params, tokens):
    """Logits [T, V] of one document, float64, written from the papers."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    T, H = len(tokens), cfg.head_dim

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    inv = cfg.rope_theta ** (-np.arange(0, H, 2) / H)
    if s := cfg.rope_scaling:
        for i, f in enumerate(inv):
            wavelength = 2 * np.pi / f
            if wavelength > s.original_max_len / s.low_freq_factor:
                inv[i] = f / s.factor
            elif wavelength > s.original_max_len / s.high_freq_factor:
                t = (s.original_max_len / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                inv[i] = (1 - t) * f / s.factor + t * f
    angle = np.arange(T)[:, None] * inv

    def rope(x):
        a, b = x[:, : H // 2], x[:, H // 2 :]
        c, s = np.cos(angle), np.sin(angle)
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    x = p["embedding"][tokens]
    for layer in range(cfg.num_layers):
        w = jax.tree.map(lambda v: v[layer], p["layers"])
        a, h = w["attention"], norm(x, w["attention_norm"]["scale"])
        out = np.zeros_like(x)
        for n in range(cfg.num_heads):
            k_head = n * cfg.num_kv_heads // cfg.num_heads
            q, k, v = h @ a["q"][:, n], h @ a["k"][:, k_head], h @ a["v"][:, k_head]
            if cfg.qkv_bias:
                q, k = q + a["q_bias"][n], k + a["k_bias"][k_head]
                v = v + a["v_bias"][k_head]
            if cfg.qk_norm:
                q = norm(q, a["q_norm"]["scale"])
                k = norm(k, a["k_norm"]["scale"])
            scores = rope(q) @ rope(k).T / np.sqrt(H)
            scores[np.triu_indices(T, 1)] = -np.inf
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out += (e / e.sum(-1, keepdims=True)) @ v @ a["o"][n]
        x = x + out
        h, m = norm(x, w["mlp_norm"]["scale"]), w["mlp"]
        gate = h @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
    x = norm(x, p["final_norm"]["scale"])
    return x @ p.get("unembedding", p["embedding"]).T


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_reference(name):
    cfg = VARIANTS[name]
    model, params = make(cfg)
    tokens, *rest = inputs(cfg)
    got = run(model, params, tokens, *rest)
    for b in range(2):
        want = reference(cfg, params, tokens[b])
        assert np.abs(got[b] - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gamayun_1p5b", 1_495_384_576),
        ("llama3p2_1b", 1_235_814_400),
        ("qwen2p5_1p5b", 1_543_714_304),
        ("qwen3_1p7b", 1_720_574_976),
    ],
)
def test_parameter_counts_of_the_presets(name, count):
    """The last three are what the models' makers publish."""
    assert parameter_count(getattr(presets, name)()) == count


def test_packed_documents_are_as_alone():
    cfg = VARIANTS["gamayun"]
    model, params = make(cfg)
    tokens, *_ = inputs(cfg, B=1, T=24)
    positions = np.r_[np.arange(9), np.arange(11), np.zeros(4)].astype(np.int32)[None]
    segments = np.r_[np.ones(9), np.full(11, 2), np.zeros(4)].astype(np.int32)[None]
    packed = run(model, params, tokens, positions, segments)[0]
    for part in (slice(0, 9), slice(9, 20)):
        n = part.stop - part.start
        alone = run(
            model, params, tokens[:, part],
            np.arange(n, dtype=np.int32)[None], np.ones((1, n), np.int32),
        )[0]  # fmt: skip
        np.testing.assert_allclose(packed[part], alone, rtol=1e-4, atol=1e-5)
    assert np.isfinite(packed).all()


def test_later_tokens_do_not_matter():
    model, params = make(SMALL)
    tokens, *rest = inputs(SMALL)
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % SMALL.vocab_size
    a, b = run(model, params, tokens, *rest), run(model, params, changed, *rest)
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.abs(a[:, 12:] - b[:, 12:]).max() > 1e-3


@pytest.mark.parametrize("pieces", [(1,) * 12, (7, 1, 4)])
def test_the_cache_equals_the_full_forward(pieces):
    cfg = VARIANTS["gamayun"]
    model, params = make(cfg)
    tokens, positions, segments = inputs(cfg, T=12)
    segments = segments.copy()
    segments[0, :3] = 0  # left padding in the first row
    positions = np.maximum(positions - np.array([[3], [0]], np.int32), 0)
    full = run(model, params, tokens, positions, segments)
    cache, at, found = init_cache(cfg, 2, 16), 0, []
    step = jax.jit(lambda p, c, *a: model.apply({"params": p}, *a, c))
    for n in pieces:
        part = [a[:, at : at + n] for a in (tokens, positions, segments)]
        x, cache = step(params, cache, *part)
        found.append(np.asarray(logits(params, x)))
        at += n
    got = np.concatenate(found, axis=1)
    np.testing.assert_allclose(got[0, 3:], full[0, 3:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], full[1], rtol=1e-4, atol=1e-5)


def test_scan_and_remat_do_not_change_gradients():
    tokens, *rest = inputs(SMALL)
    found = []
    for compute in (
        FLOAT32,
        ComputeConfig(dtype="float32", scan_layers=False),
        ComputeConfig(dtype="float32", remat="minimal"),
        ComputeConfig(dtype="float32", remat="full"),
    ):
        model, params = make(SMALL, compute)

        def loss(p, model=model):
            x, _ = model.apply({"params": p}, tokens, *rest)
            return jnp.mean(jnp.square(x))

        found.append(jax.grad(loss)(params))
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_is_close_and_parameters_stay_float32():
    tokens, *rest = inputs(SMALL)
    model, params = make(SMALL)
    half, same = make(SMALL, ComputeConfig(dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(same)} == {jnp.dtype("float32")}
    a, b = run(model, params, tokens, *rest), run(half, same, tokens, *rest)
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_residual_outputs_start_smaller():
    one = jnp.zeros((1, 1), jnp.int32)
    cfg = dataclasses.replace(SMALL, d_model=128, d_ff=256, num_layers=8)
    params = nn.unbox(Transformer(cfg).init(jax.random.key(0), one, one, one))["params"]
    mlp = params["layers"]["mlp"]
    assert np.std(mlp["up"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(mlp["down"]) == pytest.approx(0.02 / 4, rel=0.05)


def test_flops_by_hand():
    """2 a multiply-add, 3 passes; the causal half of the scores."""
    cfg = SMALL
    layer = 24 * 6 * (4 + 2 + 2 + 4) + 3 * 24 * 40
    by_hand = 6 * (2 * layer + 61 * 24) + 3 * 2 * (2 * 4 * 6 * 2 * 10 / 2)
    assert flops_per_token(cfg, 10) == by_hand


def test_long_wavelengths_are_divided_by_the_factor():
    cfg = presets.llama3p2_1b()
    plain = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    scaled = rope_frequencies(cfg)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 32, rtol=1e-6)
    np.testing.assert_array_equal(scaled[:8], plain[:8])


def test_bad_shapes():
    with pytest.raises(UserError, match="multiple of"):
        dataclasses.replace(SMALL, num_kv_heads=3)
    with pytest.raises(UserError, match="odd"):
        dataclasses.replace(SMALL, head_dim=5)
