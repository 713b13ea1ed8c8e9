"""Pooled states against transformers, retrieval against plain NumPy, consistency."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gamayun_jax.cli import main
from gamayun_jax.config import ComputeConfig, MeshConfig, UserError
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.evaluate import alignment, consistency, results
from gamayun_jax.interop import hf_config, hf_weights
from gamayun_jax.model import sharding
from gamayun_jax.model.transformer import Transformer, hidden_states
from gamayun_jax.report.alignment import best_layer
from gamayun_jax.training.checkpoint import Checkpoints, TrainState
from gamayun_jax.training.run_meta import RunMeta

MESH = MeshConfig(2, 2, 2)


def some_texts(cfg, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, cfg.model.vocab_size, n).tolist() for n in lengths]


def pooled(cfg, params, texts, bos, mesh=MESH, devices=None, units=None, batch=8):
    evaluation = dataclasses.replace(cfg.evaluation, batch_size=batch)
    cfg = dataclasses.replace(cfg, evaluation=evaluation)
    mesh = sharding.make_mesh(mesh, devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        model = Transformer(cfg.model, cfg.compute)
        states = alignment.PooledStates(cfg, mesh, model, units or len(texts))
        placed = jax.device_put(params, sharding.replicated(mesh))
        return states(placed, texts, bos)


LENGTHS = (1, 5, 63, 20, 0, 30, 17)


def test_means_of_hidden_states_equal_those_of_transformers(
    config, parameters, tmp_path
):
    """Packed and on eight devices; there one text at a time, every layer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        json.dumps(hf_config.config_to_hf(config.model))
    )
    hf_weights.write_weights(parameters, config.model, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    texts = some_texts(config, LENGTHS)
    for bos in (1, None):
        found = pooled(config, parameters, texts, bos)
        assert found.shape == (3, len(texts), 32)
        for n, ids in enumerate(texts):
            if not ids:
                assert not found[:, n].any()
                continue
            whole = [*([bos] if bos else []), *ids]
            with torch.inference_mode():
                out = model(torch.tensor([whole]), output_hidden_states=True)
            states = np.stack([h[0].numpy() for h in out.hidden_states])
            want = states[:, len(whole) - len(ids) :].mean(axis=1)
            np.testing.assert_allclose(found[:, n], want, rtol=2e-4, atol=2e-5)


def test_any_mesh_and_batch_gives_the_same(config, parameters):
    """Texts longer than a row too: each token counts once, in half a row of context."""
    texts = some_texts(config, [200, 64, 3, 129])
    one = MeshConfig(1, 1, 1)
    a = pooled(config, parameters, texts, 1)
    b = pooled(config, parameters, texts, 1, one, jax.devices()[:1], 9, 3)
    np.testing.assert_allclose(a, b[:, : len(texts)], rtol=1e-4, atol=1e-5)
    # The embedding needs no context: its mean is known.
    table = np.asarray(parameters["embedding"])
    want = np.stack([table[ids].mean(axis=0) for ids in texts])
    np.testing.assert_allclose(a[0], want, rtol=1e-4, atol=1e-6)


def test_training_keeps_no_hidden_states(config):
    """Nothing of shape [L, B, T, D] leaves the scan, unless it is asked for."""
    cfg = dataclasses.replace(config.model, num_layers=3)
    model = Transformer(cfg, ComputeConfig(remat="full"))
    ids = jnp.ones((2, 16), jnp.int32)
    params = model.init(jax.random.key(0), ids, ids, ids)
    assert set(params) == {"params"}

    def plain(params):
        return model.apply(params, ids, ids, ids)

    def asked(params):
        return hidden_states(model, params["params"], ids, ids, ids)

    stacked = f"3,2,16,{cfg.d_model}]"
    assert stacked not in str(jax.make_jaxpr(plain)(params))
    assert stacked in str(jax.make_jaxpr(asked)(params))
    assert not jax.tree.leaves(model.apply(params, ids, ids, ids, mutable="other")[1])


# --- retrieval


def accuracy_by_loops(a, b, centred):
    """float64, one pair of texts at a time."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if centred:
        a, b = a - a.mean(0), b - b.mean(0)
    right = 0.0
    for i in range(len(a)):
        cosines = [
            np.dot(a[i], b[j]) / (np.linalg.norm(a[i]) * np.linalg.norm(b[j]))
            for j in range(len(b))
        ]
        right += cosines[i] == max(cosines)
    return right / len(a)


def test_retrieval_is_what_loops_find():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 30, 8))
    states = {
        k: (base + s * rng.normal(size=base.shape) + shift).astype(np.float32)
        for k, s, shift in (("en", 0.4, 0.0), ("ru", 0.9, 2.0), ("tr", 0.3, -1.0))
    }
    found = alignment.retrieval(states)
    for kind in ("plain", "centred"):
        for a in states:
            for b in states:
                if a != b:
                    got = found[kind]["accuracy"][a][b]
                    for s in (0, 1):
                        want = accuracy_by_loops(
                            states[a][s], states[b][s], kind == "centred"
                        )
                        assert got[s] == pytest.approx(want)
    each = [
        v
        for a in found["plain"]["accuracy"].values()
        for v in np.transpose([*a.values()])
    ]
    assert len(each) == 6
    x, y = states["en"][1].astype(np.float64), states["tr"][1].astype(np.float64)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    assert found["plain"]["cosine"]["en"]["tr"][1] == pytest.approx(
        (x * y).sum(1).mean(), abs=1e-5
    )
    for layer in (0, 1):
        missed = alignment.misses({k: x[layer] for k, x in states.items()})
        for a, by in found["plain"]["accuracy"].items():
            assert len(missed[a]) == 30
            mean = np.mean([row[layer] for row in by.values()])
            assert missed[a].mean() == pytest.approx(1 - mean)
    # An offset of a whole language hides what centring shows.
    assert found["centred"]["mean"][0] > found["plain"]["mean"][0] + 0.2
    result = {"sets": {"s": {"retrieval": found}}}
    assert best_layer(result, "s") == int(np.argmax(found["plain"]["mean"]))


def test_the_same_language_is_found_and_another_is_not():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 1, 400, 16)).astype(np.float32)
    found = alignment.retrieval({"a": x, "b": x.copy(), "c": y})
    for kind in ("plain", "centred"):
        accuracy = found[kind]["accuracy"]
        assert accuracy["a"]["b"] == accuracy["b"]["a"] == [1.0]
        # 400 draws of probability 1/400: more than 8 come once in a million times.
        assert accuracy["a"]["c"][0] <= 8 / 400
        assert abs(found[kind]["others"][0]) < 0.01


def test_states_that_are_all_alike_are_at_chance():
    x = np.ones((1, 50, 4), np.float32)
    found = alignment.retrieval({"a": x, "b": x})
    assert found["plain"]["mean"] == [pytest.approx(1 / 50)]
    assert found["centred"]["mean"] == [pytest.approx(1 / 50)]


# --- consistency


def answer(language, id, picked, right=0, choices=4):
    return {
        "id": id,
        "language": language,
        "picked": {"norm": picked},
        "answer": right,
        "logprobs": [0.0] * choices,
    }


def test_consistency_counts_picks():
    picks = {"en": [0, 0, 1, 2, 3], "ru": [0, 1, 1, 3, 0]}
    rows = [answer(k, f"i{n}", p) for k, v in picks.items() for n, p in enumerate(v)]
    rows.append(answer("ru", "only here", 0))
    pair = consistency.consistency(rows, "norm")["pairs"]["en-ru"]
    assert pair["items"] == 5
    assert pair["same"] == 2 / 5  # i0 and i2
    assert pair["both_wrong"] == 2  # i2 and i3
    assert pair["same_wrong"] == 1 / 2
    assert pair["chance"] == 1 / 4
    assert pair["chance_wrong"] == pytest.approx(1 / 3)
    right = 2 / 5 * 2 / 5
    assert pair["expected"] == pytest.approx(right + 3 / 5 * 3 / 5 / 3)


def test_answers_are_read_line_by_line(tmp_path):
    rows = [answer(k, f"a\u2028b{n}", n % 3) for k in ("en", "ru") for n in range(9)]
    told = {"kind": "multiple_choice", "parallel": True, "metric": "norm"}
    (tmp_path / "items").mkdir()
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": {"t": told}}))
    results.write_items(tmp_path / "items", "t", rows)
    found = consistency.consistency_of(tmp_path)["t"]
    assert found == consistency.consistency(rows, "norm")
    path = tmp_path / "items" / "t.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    with pytest.raises(UserError, match=r"t\.jsonl cannot be read \(line 4 is no JSON"):
        consistency.consistency_of(tmp_path)


def test_random_answers_are_at_chance_and_copies_are_not():
    rng = np.random.default_rng(2)
    a, b, right = rng.integers(0, 4, (3, 4000))
    rows = [
        answer(k, f"{n}", int(p), int(right[n]))
        for k, picks in (("en", a), ("ru", b), ("tr", a))
        for n, p in enumerate(picks)
    ]
    pairs = consistency.consistency(rows, "norm")["pairs"]
    assert pairs["en-ru"]["same"] == pytest.approx(0.25, abs=0.03)
    assert pairs["en-ru"]["same_wrong"] == pytest.approx(1 / 3, abs=0.04)
    assert pairs["en-ru"]["expected"] == pytest.approx(0.25, abs=0.02)
    assert pairs["en-tr"]["same"] == pairs["en-tr"]["same_wrong"] == 1.0


def test_items_that_differ_are_refused():
    rows = [answer("en", "1", 0, 0), answer("ru", "1", 0, 1)]
    with pytest.raises(UserError, match="en and ru have different answers"):
        consistency.consistency(rows, "norm")


# --- a model


@pytest.fixture(scope="module")
def run(config, parameters, tmp_path_factory):
    """A run folder with a checkpoint of random weights, as training writes it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    store = Checkpoints(folder / "checkpoints")
    meta = RunMeta(
        step=7, tokens=3584, config=config, lineage={"run": "small"},
        tokenizer=Tokenizer(f"{config.data.corpus}/tokenizer.model").fingerprint,
    )  # fmt: skip
    params = jax.tree.map(jnp.asarray, parameters)
    store.save(TrainState(jnp.int32(7), params, {}), meta)
    store.wait()
    store.close()
    return folder


def test_the_command(config, run, tmp_path, capsys):
    answers = tmp_path / "answers"
    (answers / "items").mkdir(parents=True)
    told = {"kind": "multiple_choice", "parallel": True, "metric": "norm"}
    plain = {"kind": "perplexity", "parallel": True, "metric": "bits_per_byte"}
    tasks = {"facts": told, "help": plain}
    (answers / "eval.json").write_text(json.dumps({"tasks": tasks}))
    rows = [answer(k, "1", 2) for k in ("en", "ru", "tr")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (answers / "items" / "facts.jsonl").write_text(text)
    out = tmp_path / "out"
    words = ["align", str(run), "--out", str(out), "--eval", str(answers)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    result = json.loads((out / "alignment.json").read_text())
    assert result["layers"] == [0, 1, 2]
    assert result["consistency"]["facts"]["mean"]["same"] == 1.0
    udhr = result["sets"]["udhr"]
    assert udhr["units"] == 10
    assert udhr["languages"] == ["en", "ru", "tr"]
    assert udhr["parity"]["en"] == 1.0
    assert udhr["parity"]["ru"] > 0.5
    assert f"{udhr['parity']['tr']:.3f}" in shown
    for kind in ("plain", "centred"):
        accuracy = udhr["retrieval"][kind]["accuracy"]
        assert {len(v) for row in accuracy.values() for v in row.values()} == {3}
        assert all(
            0 <= x <= 1 for r in accuracy.values() for v in r.values() for x in v
        )
    assert (out / "udhr.png").read_bytes()[:4] == b"\x89PNG"

    assert main(["align", str(run), "--languages", "en", "xx"]) == 2
    assert "no parallel set has language 'xx'" in capsys.readouterr().err
    assert main(["align", str(run), "--eval", str(tmp_path)]) == 2
    assert "no folder of answers" in capsys.readouterr().err
    assert main(["align", str(run), "--languages", "en"]) == 2
    assert "nothing to do" in capsys.readouterr().err


def test_without_a_corpus_the_embedded_sets_are_used():
    texts = alignment.parallel_texts(None, ["ru", "ja"], 20)
    assert set(texts) == {"help", "udhr"}
    for units in texts.values():
        assert set(units) == {"ru", "ja"}
        assert [i for i, _ in units["ru"]] == [i for i, _ in units["ja"]]
        assert len(units["ru"]) == 20
