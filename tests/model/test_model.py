"""The decoder against a float64 reference in NumPy, and its invariances."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from gamayun_jax.config import ComputeConfig, ModelConfig, RopeScaling, UserError
from gamayun_jax.inference.decode import Decoder
from gamayun_jax.model import ops, presets
from gamayun_jax.model.transformer import (
    Transformer,
    _turned,
    _turned_by_product,
    logits,
    rope_angles,
    rope_frequencies,
    rotate,
)
from gamayun_jax.model.weights import (
    VOCAB_MATRIX_AXES,
    abstract_params,
    flops_per_token,
    parameter_count,
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
    "all": dataclasses.replace(
        SMALL, qk_norm=True, qkv_bias=True, tie_embeddings=False,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32),
    ),
}  # fmt: skip
FLOAT32 = ComputeConfig(dtype="float32")


@functools.cache
def make(cfg, compute=FLOAT32):
    """Model and parameters, all of them random (norms and biases too)."""
    one = jnp.zeros((1, 1), jnp.int32)
    model = Transformer(cfg, compute)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one, one, one)
    rng = np.random.default_rng(0)

    def noisy(path, x):
        middle = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.float32(middle + 0.1 * rng.normal(size=x.shape))

    return model, jax.tree_util.tree_map_with_path(noisy, shapes["params"])


@functools.cache
def forward(model):
    """The jitted logits of a model, compiled once per shape of the tokens."""

    def apply(params, *args):
        return logits(params, model.apply({"params": params}, *args))

    return jax.jit(apply)


def run(model, params, *args):
    return np.asarray(forward(model)(params, *args))


def inputs(cfg, B=2, T=20, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return tokens, positions, np.ones((B, T), np.int32)


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
    """The last three are what the models' makers publish. Nothing is allocated."""
    cfg = getattr(presets, name)()
    assert parameter_count(cfg) == count
    assert all(
        isinstance(x, jax.ShapeDtypeStruct)
        for x in jax.tree.leaves(abstract_params(cfg))
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_of_weights_is_what_the_model_declares(name):
    """Paths, shapes and dtypes."""
    declared, table = make(VARIANTS[name])[1], abstract_params(VARIANTS[name])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), declared) == jax.tree.map(
        lambda x: (x.shape, x.dtype), table
    )


@pytest.mark.parametrize("name", ["gamayun", "all"])
def test_packed_documents_are_as_alone(name):
    """Padding between and after them does not matter either, whatever it holds."""
    cfg = VARIANTS[name]
    model, params = make(cfg)
    tokens, *_ = inputs(cfg)
    parts = (slice(0, 7), slice(9, 18))
    positions, segments = np.zeros((2, 2, 20), np.int32)
    for k, part in enumerate(parts):
        positions[:, part] = np.arange(part.stop - part.start)
        segments[:, part] = k + 1
    packed = run(model, params, tokens, positions, segments)
    assert np.isfinite(packed).all()
    for part in parts:
        for b in range(2):
            alone = reference(cfg, params, tokens[b, part])
            assert np.abs(packed[b, part] - alone).max() < 1e-4 * np.abs(alone).max()
    padding = segments == 0
    changed = np.where(padding, (tokens + 1) % cfg.vocab_size, tokens)
    other = run(model, params, changed, positions, segments)
    np.testing.assert_array_equal(other[~padding], packed[~padding])


def test_later_tokens_do_not_matter():
    model, params = make(SMALL)
    tokens, *rest = inputs(SMALL)
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % SMALL.vocab_size
    a, b = run(model, params, tokens, *rest), run(model, params, changed, *rest)
    np.testing.assert_array_equal(a[:, :12], b[:, :12])
    assert np.abs(a[:, 12:] - b[:, 12:]).max() > 1e-3


def test_every_earlier_token_matters():
    """A change of token s reaches all later logits: no row of the mask is cut."""
    model, params = make(SMALL)
    tokens, *rest = inputs(SMALL)
    base = run(model, params, tokens, *rest)[0]
    for s in (0, 7, 18):
        changed = tokens.copy()
        changed[0, s] = (changed[0, s] + 1) % SMALL.vocab_size
        moved = np.abs(run(model, params, changed, *rest)[0] - base).max(-1)
        assert (moved[s:] > 1e-7).all()
        assert (moved[:s] == 0).all()


@pytest.mark.parametrize("pieces", [(1,) * 12, (7, 1, 4)])
def test_the_cache_equals_the_full_forward(pieces):
    cfg = VARIANTS["all"]
    _, params = make(cfg)
    tokens, positions, segments = inputs(cfg, T=12)
    segments = segments.copy()
    segments[0, :3] = 0  # left padding in the first row
    positions = np.maximum(positions - np.array([[3], [0]], np.int32), 0)
    decoder = Decoder(cfg, params, mesh_of((1, 1, 1)), FLOAT32)
    k_BKHS, v_BKSH = (jnp.zeros((2, cfg.num_kv_heads, *s)) for s in ((6, 16), (16, 6)))
    state = dict(caches=[(k_BKHS, v_BKSH)] * cfg.num_layers, index=0)
    state["segments"] = jnp.zeros((2, 16), jnp.int32)
    at, want = 0, [reference(cfg, params, tokens[b, s:]) for b, s in ((0, 3), (1, 0))]
    for n in pieces:
        part = [a[:, at : at + n] for a in (tokens, positions, segments)]
        got_BV, state = jax.jit(decoder._forward)(decoder.weights, *part, state)
        at += n
        for row, start, logits_TV in zip(got_BV, (3, 0), want, strict=True):
            if at > start:  # else it is padding still
                error = np.abs(row - logits_TV[at - start - 1]).max()
                assert error < 1e-4 * np.abs(logits_TV).max()
    assert state["index"] == 12


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(False, "none"), (True, "minimal"), (True, "full"), (False, "full")],
)
def test_scan_and_remat_do_not_change_loss_and_gradients(scan_layers, remat):
    tokens, *rest = inputs(SMALL)
    changed = ComputeConfig("float32", scan_layers=scan_layers, remat=remat)
    (a_loss, a), (b_loss, b) = (
        loss_and_gradients(compute)(make(SMALL)[1], tokens, *rest)
        for compute in (FLOAT32, changed)
    )
    np.testing.assert_allclose(a_loss, b_loss, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x - y).max() <= 1e-5 * np.abs(x).max()


@functools.cache
def loss_and_gradients(compute):
    model = Transformer(SMALL, compute)

    def loss(params, tokens, *rest):
        x_BTD = model.apply({"params": params}, tokens, *rest)
        log_probs = jax.nn.log_softmax(logits(params, x_BTD[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))


def test_bfloat16_compute_is_close_and_parameters_stay_float32():
    tokens, *rest = inputs(SMALL)
    model, params = make(SMALL)
    one = (jnp.zeros((1, 1), jnp.int32),) * 3
    compute = ComputeConfig("bfloat16")
    a, b = (run(m, params, tokens, *rest) for m in (model, Transformer(SMALL, compute)))
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
    assert b.dtype == np.float32
    for tree in (
        jax.eval_shape(Transformer(SMALL, compute).init, jax.random.key(0), *one),
        jax.eval_shape(loss_and_gradients(compute), params, tokens, *rest)[1],
    ):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_initial_values():
    """Normal with init_std; what adds to the residual stream by 1/sqrt(2 L) smaller."""
    one = jnp.zeros((1, 1), jnp.int32)
    cfg = dataclasses.replace(
        SMALL, d_model=64, num_heads=8, d_ff=128, num_layers=8, vocab_size=500,
        init_std=0.03, qk_norm=True, qkv_bias=True,
    )  # fmt: skip
    params = jax.jit(Transformer(cfg).init)(jax.random.key(0), one, one, one)
    params = params["params"]
    layers = params["layers"]
    for x in (params["embedding"], layers["attention"]["q"], layers["mlp"]["up"]):
        assert np.std(x) == pytest.approx(0.03, rel=0.05)
        assert np.mean(x) == pytest.approx(0, abs=0.001)
    for x in (layers["attention"]["o"], layers["mlp"]["down"]):
        assert np.std(x) == pytest.approx(0.03 / 4, rel=0.05)
    # Each layer has its own.
    assert np.abs(np.diff(layers["mlp"]["up"], axis=0)).max(axis=(1, 2)).min() > 0.03
    for name in ("attention_norm", "mlp_norm"):
        np.testing.assert_array_equal(layers[name]["scale"], 1)
    for name in "qkv":
        np.testing.assert_array_equal(layers["attention"][f"{name}_bias"], 0)


def test_flops_by_hand():
    """2 a multiply-add, 3 passes; the causal half of the scores."""
    cfg = SMALL
    layer = 24 * 6 * (4 + 2 + 2 + 4) + 3 * 24 * 40
    by_hand = 6 * (2 * layer + 61 * 24) + 3 * 2 * (2 * 4 * 6 * 2 * 10 / 2)
    assert flops_per_token(cfg, 10) == by_hand
    # 6 per parameter is right for a model whose embedding is tied, but for the norms.
    big = presets.gamayun_1p5b()
    without_scores = flops_per_token(big, 0)
    assert without_scores == pytest.approx(6 * parameter_count(big), rel=1e-3)


def test_long_wavelengths_are_divided_by_the_factor():
    cfg = presets.llama3p2_1b()
    plain = rope_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    scaled = rope_frequencies(cfg)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 32, rtol=1e-6)
    np.testing.assert_array_equal(scaled[:8], plain[:8])


@pytest.mark.parametrize("back", [False, True], ids=["forward", "gradient"])
def test_in_bfloat16_a_rotation_is_rounded_once(back):
    """Against float64, up to position 131,071: nearly all that comes out is the
    nearest bfloat16. Cosines rounded to bfloat16 give that for 63 to 89 %."""
    cfg, rng = presets.llama3p2_1b(), np.random.default_rng(0)
    positions = np.array([[1, 100, 4095, 32_767, 131_071]], np.int32)
    x = jnp.asarray(rng.normal(size=(1, 5, 8, cfg.head_dim)), jnp.bfloat16)
    angles = rope_angles(cfg, positions)
    got = rotate(x, *angles)
    if back:
        got = jax.vjp(lambda y: rotate(y, *angles), jnp.zeros_like(x))[1](x)[0]
    assert got.dtype == jnp.bfloat16
    angle = positions[0][:, None, None] * np.float64(rope_frequencies(cfg))
    a, b = np.split(np.float64(x)[0], 2, axis=-1)
    c, s = np.cos(angle), np.sin(angle) * (-1 if back else 1)
    want = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    nearest = np.asarray(got[0] == jnp.asarray(want, jnp.bfloat16)).mean((1, 2))
    assert (nearest > 0.93).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_are_turned_alike_on_all_platforms(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 128), dtype)
    np.testing.assert_array_equal(_turned_by_product(x), _turned(x))


@pytest.mark.parametrize(
    ("reduce_dtype", "most"), [("float32", 1e-6), ("bfloat16", 2**-8)]
)
def test_in_bfloat16_the_gradient_of_a_frequent_token(reduce_dtype, most):
    """Summed in float32, and rounded at most once after it. A sum in bfloat16 is
    2.6 % off for the most frequent token here."""
    rng, V, D = np.random.default_rng(0), 50, 16
    shares = 1 / np.arange(1, V + 1)
    tokens = rng.choice(V, size=(8, 500), p=shares / shares.sum()).astype(np.int32)
    dx = jnp.asarray(rng.normal(0.3, 1, (8, 500, D)), jnp.bfloat16)
    want = np.zeros((V, D))
    np.add.at(want, tokens, np.float64(dx))

    def rows(table):
        w = ops.Matrix(table, VOCAB_MATRIX_AXES, 1, reduce_dtype)
        return ops.embed(w, tokens, jnp.bfloat16)

    (got,) = jax.vjp(rows, jnp.zeros((V, D)))[1](dx)
    assert got.dtype == jnp.float32
    assert np.bincount(tokens.ravel()).max() > 800
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < most


def test_bad_shapes():
    with pytest.raises(UserError, match="multiple of"):
        dataclasses.replace(SMALL, num_kv_heads=3)
    with pytest.raises(UserError, match="odd"):
        dataclasses.replace(SMALL, head_dim=5)
    with pytest.raises(UserError, match="model.num_kv_heads=0 must be greater"):
        dataclasses.replace(SMALL, num_kv_heads=0)


@pytest.mark.parametrize(("platform", "out"), [("cpu", "f32"), ("tpu", "bf16")])
def test_a_product_in_bfloat16_leaves_xla_for_cpus_in_float32(platform, out):
    """There it takes the processor's instructions; a TPU would write twice as much."""
    x, w = jnp.zeros((2, 3, 8), jnp.bfloat16), jnp.zeros((8, 4), jnp.bfloat16)
    traced = jax.jit(lambda x, w: ops.product(x, w, 1)).trace(x, w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"dot_general .*-> tensor<[0-9x]*(\w+)>", text)
    assert products == [out]
