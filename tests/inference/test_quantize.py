"""Quantised weights: error bounds, a round trip through a checkpoint, bits per byte."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gamayun_jax import cli, train
from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.evaluate import stored_model
from gamayun_jax.inference import quantize, rounding
from gamayun_jax.interop import load_model
from gamayun_jax.model import sharding
from gamayun_jax.training.model_folder import save_model

SHAPES = {  # one matrix of each kind, stacked over 2 layers but for the embedding
    "embedding": (50, 128), "q": (2, 128, 4, 16), "o": (2, 4, 64, 48),
    "gate": (2, 192, 40), "down": (2, 96, 48),
}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_half_a_step(name, bits):
    """Against float64; bfloat16 scales add 15 steps times 2^-9 at a group's ends."""
    shape, summed = SHAPES[name], quantize.MATRICES[name].summed_axes
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[(0,) * len(shape)] = 50.0  # an outlier costs its own channel or group only
    found = quantize.quantize_matrix(jnp.asarray(w), summed, bits)
    back, w = np.asarray(quantize.dequantize(found)), w.astype(np.float64)
    axis = len(shape) + summed[0]
    if bits == 8:
        assert found["codes"].dtype == jnp.int8
        step = np.abs(w).max(axis=summed, keepdims=True) / 127
    else:
        groups = shape[axis] // 32
        assert found["codes"].nbytes == w.size // 2
        assert found["scale"].shape[axis] == groups
        assert 8 * quantize.size_bytes(found) == 4.75 * w.size
        cut = w.reshape(*shape[:axis], groups, -1, *shape[axis + 1 :])
        lengths = np.ptp(
            np.append(cut, 0 * cut, axis + 1), axis=axis + 1, keepdims=True
        )
        step = np.broadcast_to(lengths / 15, cut.shape).reshape(shape)
    assert (np.abs(back - w) <= step * (0.501 if bits == 8 else 0.54)).all()
    if bits == 8:  # a zero point may leave one of int4's 16 codes without use
        again = quantize.quantize_matrix(jnp.asarray(back), summed, bits)
        np.testing.assert_allclose(quantize.dequantize(again), back, rtol=1e-5)


def test_rounding_by_inputs_makes_the_products_better():
    """It rounds to the nearest where no input has to do with another."""
    rng = np.random.default_rng(0)
    w_NHD = rng.normal(size=(2, 64, 24)).astype(np.float32)
    summed = quantize.MATRICES["o"].summed_axes
    x_RI = (rng.normal(size=(512, 12)) @ rng.normal(size=(12, 128))).astype(np.float32)
    x_RI += 0.1 * rng.normal(size=x_RI.shape)
    x_RI[:, 5] = 0
    factor = rounding.inverse_factor(x_RI.T @ x_RI)
    h = (x_RI.T @ x_RI).astype(np.float64)
    mean = h.trace() / 128
    h[5, 5] = 1
    h += rounding.DAMPING * mean * np.eye(128)
    np.testing.assert_allclose(factor.T @ factor @ h, np.eye(128), atol=1e-3)
    nearest = quantize.quantize_matrix(w_NHD, summed, 4)
    better = rounding.round_matrix(w_NHD, summed, factor)
    alike = rounding.round_matrix(w_NHD, summed, np.eye(128, dtype=np.float32))
    for found in (better, alike):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
            lambda x: (x.shape, x.dtype), nearest
        )
    jax.tree.map(np.testing.assert_array_equal, alike, nearest)

    def error(leaf):
        off = (np.asarray(quantize.dequantize(leaf)) - w_NHD).reshape(128, 24)
        return np.square(x_RI @ off).sum()

    assert error(better) < 0.25 * error(nearest)


def test_columns_are_rounded_as_the_paper_has_it():
    """Against the algorithm in float64, a row at a time with the inverse itself."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(64, 8)).astype(np.float32)
    x = rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))
    factor = rounding.inverse_factor(x.T @ x)
    found = rounding.round_matrix(jnp.asarray(w), (-2,), factor)
    codes = np.asarray(found["codes"])
    codes = np.stack([codes & 15, codes >> 4], 1).reshape(64, 8)
    scale, zero = (np.asarray(found[k], np.float64) for k in ("scale", "zero"))
    left, inverse = w.astype(np.float64), factor.T.astype(np.float64) @ factor
    same = 0
    for i in range(64):
        s, z = scale[i // 32], zero[i // 32]
        expected = np.clip(np.round(left[i] / s) + z, 0, 15)
        same += (expected == codes[i]).sum()
        missed = (left[i] - (codes[i] - z) * s) / inverse[0, 0]
        left[i:] -= np.outer(inverse[:, 0], missed)
        inverse -= np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0]
        inverse = inverse[1:, 1:]
    assert same >= 0.99 * codes.size  # float32 falls otherwise at a half


def test_a_matrix_of_zeros():
    for bits in (8, 4):
        found = quantize.quantize_matrix(jnp.zeros((64, 8)), (-2,), bits)
        np.testing.assert_array_equal(quantize.dequantize(found), 0)


def test_what_is_refused():
    tree = {"gate": jnp.ones((6, 4))}
    with pytest.raises(UserError, match="choose 8 or 4"):
        quantize.quantize(tree, 3)
    with pytest.raises(UserError, match="an axis has 6"):
        quantize.quantize(tree, 4)
    with pytest.raises(UserError, match="quantised already"):
        quantize.quantize(quantize.quantize(tree, 8), 8)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run folder with checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train.train(config, folder) == 0
    return folder


def test_a_corpus_that_is_not_there_is_met_before_the_folder_is_written(
    trained, tmp_path, capsys
):
    out = tmp_path / "out"
    words = ["quantize", str(trained), str(out), "--corpus", str(tmp_path / "none")]
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert "there is no corpus in" in told.err
    assert not told.out
    assert not out.exists()


def test_a_folder_of_before_opens(trained, tmp_path):
    """int4 was symmetric, in groups of 64 with a float32 scale each."""
    cfg, params, meta, _ = load_model.load_params(trained)

    def former(leaf, summed):
        axis = leaf.ndim + summed[0]
        cut = leaf.reshape(
            *leaf.shape[:axis],
            -1,
            math.gcd(leaf.shape[axis], 64),
            *leaf.shape[axis + 1 :],
        )
        scale = np.abs(cut).max(axis=axis + 1, keepdims=True).astype(np.float32) / 7
        codes = np.round(cut / scale)
        packed = (codes.reshape(leaf.shape) + 8).astype(np.uint8)
        scales = jnp.asarray(scale.squeeze(axis + 1))
        small = {"codes": quantize.pack(jnp.asarray(packed), axis), "scale": scales}
        return small, (codes * scale).reshape(leaf.shape)

    small, floats = quantize.quantize(params, 8), {}
    for name, w in params["layers"]["mlp"].items():
        summed = quantize.MATRICES[name].summed_axes
        small["layers"]["mlp"][name], floats[name] = former(np.asarray(w), summed)
    for name, w in params["layers"]["attention"].items():
        if name in quantize.MATRICES:
            summed = quantize.MATRICES[name].summed_axes
            small["layers"]["attention"][name], _ = former(np.asarray(w), summed)
    old = dataclasses.replace(meta, bits=4)
    tokenizer = open_tokenizer(trained, meta.tokenizer, cfg.data.corpus)
    save_model(small, old, tokenizer, tmp_path / "old")
    found = load_model.load_params(tmp_path / "old").params
    for name, w in floats.items():
        np.testing.assert_allclose(found["layers"]["mlp"][name], w, rtol=1e-6)
    kept = load_model.load_params(tmp_path / "old", quantised=True).params
    jax.tree.map(np.testing.assert_array_equal, kept, small)


def test_one_device_and_eight_round_alike(trained):
    """All but what float32 sums in another order turn over at a half."""
    cfg, params, _, eight = load_model.load_params(trained)
    assert eight.size == 8
    rows = np.random.default_rng(0).integers(4, cfg.model.vocab_size, (20, 32))
    one = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    host = jax.device_get(params)
    a = rounding.quantize_by_text(cfg, params, rows.astype(np.int32), eight)
    b = rounding.quantize_by_text(cfg, host, rows.astype(np.int32), one)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), quantize.quantize(host, 4))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == shapes
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.mean(np.asarray(x) == np.asarray(y)) > 0.98


@pytest.mark.slow
def test_the_command_line(trained, tmp_path, capfd):
    """Quantise, evaluate before and after, generate from the result."""
    old = stored_model.evaluate_heldout(trained)[0]["sets"]["udhr"]["languages"]
    capfd.readouterr()
    for bits, most, option in ((8, 0.01, ["--no-eval"]), (4, 0.1, [])):
        out = tmp_path / f"int{bits}"
        argv = ["quantize", str(trained), str(out), f"--bits={bits}", *option]
        assert cli.main(argv) == 0
        said = capfd.readouterr().out
        assert ("bits per byte on held-out set 'udhr'" in said) == (not option)
        new = stored_model.evaluate_heldout(out)[0]["sets"]["udhr"]["languages"]
        record = json.loads((out / "quantised.json").read_text())
        assert record["bytes"]["after"] < record["bytes"]["before"] / 2
        found = [e["sets"]["udhr"]["languages"] for e in record["evals"]]
        assert found == ([] if option else [old, new])
        for language, row in old.items():
            change = new[language]["bits_per_byte"] - row["bits_per_byte"]
            assert abs(change) < most
        # The folder stands on its own: it has its tokenizer.
        argv = ["generate", str(out), "--prompt", "The ", "--max-tokens", "20"]
        assert cli.main(argv) == 0
        assert capfd.readouterr().out.startswith("The ")
        assert not list(tmp_path.glob(".*"))
    assert cli.main(["report", str(trained), str(out), f"--out={tmp_path / 'r'}"]) == 0
    page = (tmp_path / "r" / "index.html").read_text()
    assert "Quantised weights of" in page
    assert "unpaired" not in page.split("Quantised weights of")[1].split("</table>")[0]
    assert cli.main(["quantize", str(out), str(tmp_path / "again")]) == 2
    assert "quantised already" in capfd.readouterr().err
    assert cli.main(["quantize", str(trained), str(out)]) == 2
    assert "exists already" in capfd.readouterr().err


@pytest.mark.slow
def test_generate_on_the_command_line(trained, tmp_path, capfd, monkeypatch):
    capfd.readouterr()
    model = str(trained)
    assert cli.main(["generate", model]) == 2
    assert "give --prompt TEXT" in capfd.readouterr().err
    assert cli.main(["generate", model, "--prompt", "a", "--top-p", "2"]) == 2
    assert "top_p=2.0 must be in (0, 1]" in capfd.readouterr().err
    argv = ["generate", model, "--max-tokens", "8", "--temperature", "1"]
    argv += ["--prompt", "The ", "--prompt", "Это ", "--interactive"]
    monkeypatch.setattr("sys.stdin", iter(["one\n", "\n", "two\n"]))
    assert cli.main(argv) == 0
    said, noted = capfd.readouterr()
    assert "temperature 1 with --seed 0" in noted
    assert said.startswith("The ")
    assert "\nЭто " in said
    assert "\none" in said
    assert "two" not in said
    # Drawn unless it is asked not to be, and the same again.
    texts = []
    for words in ([], [], ["--seed", "1"], ["--temperature", "0"]):
        argv = ["generate", model, "--max-tokens", "16", "--prompt", "The ", *words]
        assert cli.main(argv) == 0
        said, noted = capfd.readouterr()
        texts.append(said)
        drawn = "drawn at --temperature 0.8" in noted
        assert drawn == (words[:1] != ["--temperature"])
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_another_tokenizer_is_refused(trained, tmp_path, config):
    corpus = Path(config.data.corpus)
    good = open_tokenizer(trained, _print(corpus), corpus)
    assert good.vocab_size == 512
    with pytest.raises(UserError, match="another tokenizer"):
        open_tokenizer(trained, "0", corpus)
    with pytest.raises(UserError, match="no tokenizer in .* or .*none: copy"):
        open_tokenizer(tmp_path, "0", tmp_path / "none")
    shutil.copy(corpus / "tokenizer.model", tmp_path)
    step = tmp_path / "checkpoints" / "13"
    assert open_tokenizer(step, _print(corpus), "").vocab_size == 512


def _print(corpus):
    from gamayun_jax.data.tokenizer import Tokenizer

    return Tokenizer(corpus / "tokenizer.model").fingerprint


def test_sizes():
    tree = {"gate": jnp.ones((64, 8)), "scale": jnp.ones(8)}
    assert quantize.size_bytes(tree) == 64 * 8 * 4 + 32
    assert quantize.size_bytes(quantize.quantize(tree, 8)) == 64 * 8 + 8 * 4 + 32
    assert jax.tree.structure(quantize.dequantize_all(tree)) == jax.tree.structure(tree)
