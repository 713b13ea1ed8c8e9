"""Held-out scores against units run one at a time, and their standard errors."""

import copy
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax.config import MeshConfig, UserError
from gamayun_jax.data.corpus import Corpus
from gamayun_jax.data.heldout_sets import subsample_units
from gamayun_jax.evaluate import heldout
from gamayun_jax.evaluate.heldout import HeldoutEvaluator
from gamayun_jax.evaluate.scoring import (
    pack,
    sum_over_batches,
    token_scores,
    windows,
)
from gamayun_jax.evaluate.standard_errors import pooled_ratio, ratio
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, unembedding

MESH = MeshConfig(2, 2, 2)  # one for most tests, so that they share a program


def scores(config, corpus, params, mesh, devices=None, **changes):
    evaluation = dataclasses.replace(config.evaluation, **changes)
    cfg = dataclasses.replace(config, evaluation=evaluation)
    mesh = sharding.make_mesh(mesh, devices)
    model = Transformer(cfg.model, cfg.compute)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        evaluator = HeldoutEvaluator(cfg, corpus, mesh, model)
        placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        return evaluator.unit_sums(placed), evaluator.run(placed)[0]["udhr"]


class Changed(Corpus):
    """A corpus whose held-out texts are those of `changes` where it has them."""

    changes: dict = {}  # noqa: RUF012

    def heldout_sets(self):
        return {
            name: [k for k in found if self.changes.get(k, True)]
            for name, found in super().heldout_sets().items()
        }

    def heldout(self, name, language):
        return self.changes.get(language) or super().heldout(name, language)


def changed(corpus, **changes):
    new = Changed(corpus.folder, corpus.manifest, corpus.sources)
    object.__setattr__(new, "changes", changes)
    return new


@pytest.fixture(scope="module")
def result(config, corpus, parameters):
    return scores(config, corpus, parameters, MESH)


def score_alone(run, w_VD, stream, begin, done):
    """Nats and right tokens of stream[done + 1 :], in float64, seen from `begin`."""
    inputs, targets = stream[begin:-1], np.array(stream[begin + 1 :])
    n, places = len(inputs), np.arange(64, dtype=np.int32)[None]
    tokens = np.pad(np.array(inputs, np.int32), (0, 64 - n))[None]
    x_BTD = run(tokens, places, (places < n).astype(np.int32))
    z = np.asarray(x_BTD, np.float64)[0, :n] @ w_VD.T
    z -= z.max(-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    keep = np.arange(n) >= done - begin
    hits = z.argmax(-1) == targets
    return -logp[np.arange(n), targets][keep].sum(), hits[keep].sum()


@pytest.mark.parametrize("characters", [None, 25])
def test_units_equal_those_run_alone(config, corpus, parameters, result, characters):
    """Packed, sharded and cut by the evaluator; here one window at a time.

    Most whole units are cut, and then fill their rows; short ones share rows.
    Positions begin at 0 in each window: only their differences matter (RoPE).
    """
    model = Transformer(config.model, config.compute)
    tokenizer = corpus.tokenizer()
    found = result[0]
    if characters:
        texts = {k: corpus.heldout("udhr", k) for k in config.languages}
        short = {k: [(i, t[:characters]) for i, t in v] for k, v in texts.items()}
        corpus = changed(corpus, **short)
        found = scores(config, corpus, parameters, MESH)[0]
    w_VD = np.asarray(unembedding(parameters), np.float64)
    run = jax.jit(lambda t, p, s: model.apply({"params": parameters}, t, p, s))
    want, whole = [], 0
    for language in config.languages:
        for _, text in subsample_units(corpus.heldout("udhr", language), 10):
            ids = tokenizer.encode(text)
            stream = [tokenizer.bos_id, *ids]
            begin, done, total = 0, 0, np.zeros(2)
            while done < len(ids):
                end = min(begin + 64, len(ids))
                total += score_alone(run, w_VD, stream[: end + 1], begin, done)
                begin, done = end - 32, end
            want.append(total)
            whole += len(ids) <= 64
    assert whole == len(want) if characters else 0 < whole < len(want)
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 2), (1, 8, 1), (4, 1, 2)])
def test_any_mesh_and_batch_gives_the_same(config, corpus, parameters, result, mesh):
    devices = jax.devices()[: math.prod(mesh)]
    sums, _ = scores(
        config, corpus, parameters, MeshConfig(*mesh), devices, batch_size=3
    )
    np.testing.assert_allclose(sums, result[0], rtol=1e-5)


@pytest.mark.parametrize("chunk", [16, 128])
def test_the_head_in_chunks_gives_the_same(config, corpus, parameters, result, chunk):
    compute = dataclasses.replace(config.compute, loss_chunk=chunk)
    cfg = dataclasses.replace(config, compute=compute)
    chunked, _ = scores(cfg, corpus, parameters, MeshConfig(1, 4, 2))
    np.testing.assert_allclose(chunked, result[0], rtol=1e-5)


def test_chunks_never_form_all_logits():
    x = jax.ShapeDtypeStruct((4, 64, 8), jnp.float32)
    w = jax.ShapeDtypeStruct((512, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def program(chunk):
        score = functools.partial(token_scores, chunk=chunk)
        return jax.jit(score).lower(x, w, ids).as_text()

    assert "4x64x512" in program(0)
    assert "4x64x512" not in program(16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [0, 4])
def test_scores_are_those_of_numpy(chunk, dtype):
    """Of equal logits, which small whole numbers often give, the first is the most
    likely, as argmax has it; a logit that is not a number is never."""
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (3, 16, 4)).astype(np.float64)
    w = rng.integers(-2, 3, (24, 4)).astype(np.float64)
    logits = x @ w.T
    targets = np.where(
        rng.random((3, 16)) < 0.5, logits.argmax(-1), rng.integers(0, 24, (3, 16))
    )
    ties = (logits == logits.max(-1, keepdims=True)).sum(-1) > 1
    assert ties.any()
    assert not ties.all()
    score = jax.jit(functools.partial(token_scores, chunk=chunk))
    nll, hit = score(jnp.asarray(x, dtype), jnp.asarray(w, dtype), targets)
    np.testing.assert_array_equal(hit, logits.argmax(-1) == targets)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - picked
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
    x[0, 0, 0] = np.nan
    _, hit = score(jnp.asarray(x, dtype), jnp.asarray(w, dtype), targets)
    assert hit[0, 0] == 0


def test_one_program_and_one_transfer(config, corpus, parameters, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(
        jax, "device_get", lambda x: (fetched.append(x), device_get(x))[1]
    )
    mesh = sharding.make_mesh(MESH)
    model = Transformer(config.model, config.compute)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        evaluator = HeldoutEvaluator(config, corpus, mesh, model)
        placed = jax.device_put(parameters, sharding.replicated(mesh))
        heldout.add_scores.clear_cache()
        evaluator.run(placed)
    assert len(evaluator._batches) > 1
    assert [x.shape for x in fetched] == [(30, 2)]
    assert fetched[0].sharding.is_fully_replicated
    assert heldout.add_scores._cache_size() == 1


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
    units = subsample_units(corpus.heldout("udhr", "ru"), 10)
    text = "\n".join(t for _, t in units).encode()
    assert rows["ru"]["baselines"]["xz"] == pytest.approx(
        8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    )
    tokens_per_byte = rows["ru"]["tokens"] / rows["ru"]["bytes"]
    assert rows["ru"]["baselines"]["uniform"] == pytest.approx(9 * tokens_per_byte)
    assert rows["ru"]["baselines"]["unigram"] < rows["ru"]["baselines"]["uniform"]
    for bits in heldout.unigram_bits(corpus).values():
        assert (2.0**-bits).sum() == pytest.approx(1)


def test_what_xz_makes_of_the_texts_is_in_the_manifest(
    config, corpus, result, monkeypatch
):
    """Packing is slow: no start and no host does it again."""
    from gamayun_jax.data import heldout_sets

    heldout_sets.xz_bytes.cache_clear()
    mesh = sharding.make_mesh(MESH)

    def evaluator(corpus):
        model = Transformer(config.model, config.compute)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            return HeldoutEvaluator(config, corpus, mesh, model)

    packed, compress = [], heldout_sets.lzma.compress

    def counted(*args, **kwargs):
        packed.append(args)
        return compress(*args, **kwargs)

    monkeypatch.setattr(heldout_sets.lzma, "compress", counted)
    evaluator(corpus)
    assert not packed
    former = copy.deepcopy(corpus.manifest)  # as a former version wrote it
    for row in former["heldout"]["udhr"]["languages"].values():
        del row["xz"]
    before = dataclasses.replace(corpus, manifest=former)
    found = evaluator(before).texts["udhr"]["ru"].baselines["xz"]
    assert len(packed) == len(config.languages)
    assert found == result[1]["languages"]["ru"]["baselines"]["xz"]


def test_a_model_that_knows_nothing_is_uniform(config, corpus, parameters):
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    _, found = scores(config, corpus, zeros, MESH)
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
    assert rows["loss_mask"].sum() == sum(len(w.targets) - w.scored for w in parts)
    for u in range(40):
        mine = (rows["unit"] == u) & (rows["loss_mask"] > 0)
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


def test_the_pooled_standard_error_is_the_bootstrap_s():
    """Languages differ much, which is no error; units are drawn in each."""
    rng = np.random.default_rng(0)
    sizes = [rng.integers(20, 200, 300) * k for k in (1, 2, 3)]
    bits = [s * rng.normal(r, 0.4, 300) for s, r in zip(sizes, (1, 2, 5), strict=True)]
    value, error = pooled_ratio(bits, sizes)
    total_bits, total_sizes = np.zeros(2000), np.zeros(2000)
    for b, s in zip(bits, sizes, strict=True):
        picks = rng.integers(0, 300, (2000, 300))
        total_bits += b[picks].sum(1)
        total_sizes += s[picks].sum(1)
    assert value == pytest.approx(np.sum(bits) / np.sum(sizes))
    assert error == pytest.approx((total_bits / total_sizes).std(), rel=0.1)
    assert pooled_ratio(bits[:1], sizes[:1]) == pytest.approx(ratio(bits[0], sizes[0]))


def test_one_unit_has_no_standard_error(config, corpus, parameters):
    one, two = np.array([8.0]), np.array([8.0, 9.0])
    assert ratio(one, 5 * one) == (0.2, None)
    assert pooled_ratio([two, one], [two, one])[1] is None
    _, found = scores(config, corpus, parameters, MESH, max_units=1)
    rows = [*found["languages"].values(), found["macro"], found["micro"]]
    for row in rows:
        errors = {k: v for k, v in row.items() if k.endswith("_se")}
        assert set(errors.values()) == {None}


def test_errors_of_parallel_means_are_the_bootstrap_s_over_units(
    config, corpus, parameters
):
    sums, found = scores(config, corpus, parameters, MESH, max_units=0)
    texts = [corpus.heldout("udhr", k) for k in config.languages]
    sizes = np.array([[len(t.encode()) for _, t in units] for units in texts])
    bits = sums[:, 0].reshape(sizes.shape) / math.log(2)
    n = sizes.shape[1]
    picks = np.random.default_rng(0).integers(0, n, (4000, n))
    bits, sizes = bits[:, picks].sum(-1), sizes[:, picks].sum(-1)
    micro = (bits.sum(0) / sizes.sum(0)).std()
    macro = (bits / sizes).mean(0).std()
    assert found["micro"]["bits_per_byte_se"] == pytest.approx(micro, rel=0.1)
    assert found["macro"]["bits_per_byte_se"] == pytest.approx(macro, rel=0.1)


def test_no_step_waits_behind_another():
    """Many in a row, over eight CPU devices: XLA's threads would block each other."""
    mesh = sharding.make_mesh(MESH)
    waited = []

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def summed(sums, batch):
        x = batch["x"].astype(jnp.float32)
        for _ in range(20):
            x = x - x.mean() * 0.1  # devices wait for each other
        return sums + x.sum()

    def step(params, sums, batch):
        waited.append(not sums.is_ready())
        return summed(sums, batch)

    parts = [{"x": np.full((8, 4096), k)} for k in range(60)]
    total = sum_over_batches(step, None, parts, (), mesh)
    expected = 8 * 4096 * sum(range(60)) * 0.9**20
    assert total == pytest.approx(expected, rel=1e-4)
    assert len(waited) == 60
    assert not any(waited)


def test_the_same_units_are_chosen_in_every_language(corpus):
    chosen = [
        [i for i, _ in subsample_units(corpus.heldout("udhr", k), 7)]
        for k in ("en", "ru", "tr")
    ]
    assert chosen[0] == chosen[1] == chosen[2]


def test_an_unknown_language(config, corpus):
    mesh = sharding.make_mesh(config.mesh)
    model = Transformer(config.model, config.compute)
    with pytest.raises(UserError, match="there are: en, ru, tr"):
        HeldoutEvaluator(config, corpus, mesh, model, ["xx"])


def test_a_missing_language_is_a_named_gap(config, corpus, parameters):
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        evaluator = HeldoutEvaluator(
            config,
            changed(corpus, en=[]),
            mesh,
            Transformer(config.model, config.compute),
        )
        placed = jax.device_put(parameters, sharding.replicated(mesh))
        rows = evaluator.run(placed)[0]["udhr"]["languages"]
    assert list(evaluator.texts["udhr"]) == ["ru", "tr"]
    assert list(rows) == ["ru", "tr"]
    assert [r["parity"] for r in rows.values()] == [None, None]


def test_empty_units_count(config, corpus, parameters):
    units = corpus.heldout("udhr", "ru")
    chosen = subsample_units(units, 10)
    left = {i for i, _ in chosen[5:]}

    def of(changes):
        return scores(config, changed(corpus, **changes), parameters, MESH)[1]

    found = of({"ru": [(i, t if i in left else "") for i, t in units]})
    rows = found["languages"]
    assert rows["ru"]["units"] == rows["en"]["units"] == 10
    assert rows["ru"]["bytes"] == sum(len(t.encode()) for _, t in chosen[5:])
    json.dumps(found, allow_nan=False)
    found = of({"ru": [(i, "") for i, _ in units]})
    assert list(found["languages"]) == ["en", "tr"]
    json.dumps(found, allow_nan=False)


def test_parallel_units_that_do_not_match(config, corpus):
    mesh = sharding.make_mesh(config.mesh)
    model = Transformer(config.model, config.compute)
    fewer = changed(corpus, ru=corpus.heldout("udhr", "ru")[:5])
    with pytest.raises(UserError, match="ru and en have different units"):
        HeldoutEvaluator(config, fewer, mesh, model)


def test_a_tokenizer_beyond_the_model(config, corpus, replace):
    small = replace(config, "model.vocab_size", 256)
    mesh = sharding.make_mesh(config.mesh)
    model = Transformer(small.model, config.compute)
    with pytest.raises(UserError, match=r"512 ids, but the model .*vocab_size=256"):
        HeldoutEvaluator(small, corpus, mesh, model)
