"""Held-out scores against units run one at a time, and their standard errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax import evaluate, sharding
from gamayun_jax.config import MeshConfig, UserError
from gamayun_jax.evaluate import HeldoutEvaluator, pack, ratio, windows
from gamayun_jax.model import Transformer, logits


@pytest.fixture(scope="module")
def parameters(config):
    one = jnp.zeros((1, 1), jnp.int32)
    model = Transformer(config.model, config.compute)
    params = nn.unbox(model.init(jax.random.key(3), one, one, one))["params"]
    # Large enough weights that the predictions differ from uniform.
    return jax.tree.map(lambda x: np.asarray(8 * x) if x.ndim > 2 else x, params)


def scores(config, corpus, params, mesh, devices=None, **changes):
    evaluation = dataclasses.replace(config.evaluation, **changes)
    cfg = dataclasses.replace(config, evaluation=evaluation)
    mesh = sharding.make_mesh(mesh, devices)
    model = Transformer(cfg.model, cfg.compute)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        evaluator = HeldoutEvaluator(cfg, corpus, mesh, model)
        placed = jax.device_put(params, sharding.replicated(mesh))
        return evaluator.unit_sums(placed), evaluator.run(placed)["sets"]["udhr"]


@pytest.fixture(scope="module")
def result(config, corpus, parameters):
    return scores(config, corpus, parameters, MeshConfig(2, 2, 2))


def test_units_equal_those_run_alone(config, corpus, parameters, result):
    model = Transformer(config.model, config.compute)
    tokenizer = corpus.tokenizer()
    sums, _ = result
    run = jax.jit(lambda t, p, s: model.apply({"params": parameters}, t, p, s)[0])
    row = 0
    checked = 0
    for language in config.languages:
        for _, text in evaluate.choose(corpus.heldout("udhr", language), 10):
            ids = tokenizer.encode(text)
            if len(ids) <= 64 and checked % 3 == 0:
                tokens = np.zeros((1, 64), np.int32)
                tokens[0, : len(ids)] = [tokenizer.bos_id, *ids[:-1]]
                segments = (np.arange(64) < len(ids)).astype(np.int32)[None]
                positions = np.arange(64, dtype=np.int32)[None]
                x = run(tokens, positions, segments)
                z = np.asarray(logits(parameters, x), np.float64)[0, : len(ids)]
                z -= z.max(-1, keepdims=True)
                logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
                nats = -logp[np.arange(len(ids)), ids].sum()
                assert sums[row, 0] == pytest.approx(nats, rel=1e-4)
                assert sums[row, 1] == (z.argmax(-1) == ids).sum()
            checked += 1
            row += 1
    assert row == len(sums)


def test_accuracy_where_logits_are_nearly_flat():
    """The target's logit must not be recomputed from what rounding has eaten."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(512, 8)).astype(np.float32)
    x = (1e-2 * rng.normal(size=(4, 16, 8))).astype(np.float32)
    best = np.einsum("btd,vd->btv", x.astype(np.float64), w).argmax(-1)
    for chunk in (0, 4):
        _, hit = evaluate.token_scores(x, w, best.astype(np.int32), chunk)
        assert np.asarray(hit).mean() > 0.98


def test_any_mesh_and_batch_gives_the_same(config, corpus, parameters, result):
    one, _ = scores(
        config, corpus, parameters, MeshConfig(1, 1, 1), jax.devices()[:1], batch_size=3
    )
    np.testing.assert_allclose(one[:, 0], result[0][:, 0], rtol=1e-4)


def test_results_add_up(config, corpus, result):
    sums, found = result
    rows = found["languages"]
    assert list(rows) == list(config.languages)
    assert rows["en"]["parity"] == 1.0
    for row in rows.values():
        assert row["units"] == 10
        assert row["bits_per_byte"] == pytest.approx(row["bits"] / row["bytes"])
        assert row["nll"] * row["tokens"] / math.log(2) == pytest.approx(row["bits"])
        ratio_to_english = row["bits_per_unit"] / rows["en"]["bits_per_unit"]
        assert row["parity"] == pytest.approx(ratio_to_english)
    total = sum(r["bits"] for r in rows.values())
    assert total == pytest.approx(sums[:, 0].sum() / math.log(2))
    micro = total / sum(r["bytes"] for r in rows.values())
    assert found["micro"]["bits_per_byte"] == pytest.approx(micro)
    macro = np.mean([r["bits_per_byte"] for r in rows.values()])
    assert found["macro"]["bits_per_byte"] == pytest.approx(macro)


def test_baselines(config, corpus, result):
    import lzma

    rows = result[1]["languages"]
    units = evaluate.choose(corpus.heldout("udhr", "ru"), 10)
    text = "\n".join(t for _, t in units).encode()
    assert rows["ru"]["baselines"]["xz"] == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    )
    tokens_per_byte = rows["ru"]["tokens"] / rows["ru"]["bytes"]
    assert rows["ru"]["baselines"]["uniform"] == pytest.approx(9 * tokens_per_byte)
    assert rows["ru"]["baselines"]["unigram"] < rows["ru"]["baselines"]["uniform"]
    for bits in evaluate.unigram_bits(corpus).values():
        assert (2.0**-bits).sum() == pytest.approx(1)


def test_a_model_that_knows_nothing_is_uniform(config, corpus, parameters):
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    _, found = scores(config, corpus, zeros, MeshConfig(1, 8, 1))
    for row in found["languages"].values():
        assert row["nll"] == pytest.approx(math.log(512), rel=1e-6)
        assert row["bits_per_byte"] == pytest.approx(row["baselines"]["uniform"])


@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 100])
def test_windows_score_every_token_once_with_context(length):
    ids = list(range(100, 100 + length))
    parts = windows(0, ids, 1, 8)
    scored = [t for w in parts for t in w.targets[w.scored :].tolist()]
    assert scored == ids
    for w in parts:
        assert len(w.inputs) <= 8
        assert w.inputs[0] == ([1, *ids][w.position])
        assert w.scored == (0 if w.position == 0 else 4)


def test_packing_loses_nothing():
    rng = np.random.default_rng(0)
    parts = [
        w
        for u in range(40)
        for w in windows(u, rng.integers(5, 99, rng.integers(1, 30)).tolist(), 1, 16)
    ]
    rows = pack(parts, 16)
    assert rows["valid"].sum() == sum(len(w.targets) - w.scored for w in parts)
    for u in range(40):
        mine = (rows["unit"] == u) & (rows["valid"] > 0)
        want = sorted(
            t for w in parts if w.unit == u for t in w.targets[w.scored :].tolist()
        )
        assert sorted(rows["targets"][mine].tolist()) == want


def test_the_standard_error_is_the_bootstrap_s():
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 200, 300)
    bits = sizes * rng.normal(2.0, 0.4, 300)
    value, error = ratio(bits, sizes)
    picks = rng.integers(0, 300, (2000, 300))
    boot = bits[picks].sum(1) / sizes[picks].sum(1)
    assert value == pytest.approx(bits.sum() / sizes.sum())
    assert error == pytest.approx(boot.std(), rel=0.1)


def test_the_same_units_are_chosen_in_every_language(corpus):
    chosen = [
        [i for i, _ in evaluate.choose(corpus.heldout("udhr", k), 7)]
        for k in ("en", "ru", "tr")
    ]
    assert chosen[0] == chosen[1] == chosen[2]


def test_an_unknown_language(config, corpus):
    mesh = sharding.make_mesh(config.mesh)
    model = Transformer(config.model, config.compute)
    with pytest.raises(UserError, match="there are: en, ru, tr"):
        HeldoutEvaluator(config, corpus, mesh, model, ["xx"])
