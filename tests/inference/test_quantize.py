"""Quantised weights: error bounds, a round trip through a checkpoint, bits per byte."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gamayun_jax import cli, train
from gamayun_jax.config import UserError
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.evaluate import stored_model
from gamayun_jax.inference import quantize

SHAPES = {  # one matrix of each kind, stacked over 2 layers but for the embedding
    "embedding": (50, 128), "q": (2, 128, 4, 16), "o": (2, 4, 64, 48),
    "gate": (2, 192, 40), "down": (2, 96, 48),
}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_half_a_step(name, bits):
    shape, summed = SHAPES[name], quantize.MATRICES[name].summed_axes
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[(0,) * len(shape)] = 50.0  # an outlier costs its own channel or group only
    found = quantize.quantize_matrix(jnp.asarray(w), summed, bits)
    back = np.asarray(quantize.dequantize(found))
    axis = len(shape) + summed[0]
    if bits == 8:
        assert found["codes"].dtype == jnp.int8
        bound = np.abs(w).max(axis=summed, keepdims=True) / 127
    else:
        group = 32 if name == "down" else 64  # the greatest divisor of 64 that fits
        assert found["codes"].nbytes == w.size // 2
        assert found["scale"].shape[axis] == shape[axis] // group
        cut = (*shape[:axis], shape[axis] // group, group, *shape[axis + 1 :])
        bound = np.abs(w.reshape(cut)).max(axis=axis + 1, keepdims=True) / 7
        bound = np.broadcast_to(bound, cut).reshape(shape)
    assert (np.abs(back - w) <= bound * 0.501).all()
    again = quantize.quantize_matrix(jnp.asarray(back), summed, bits)
    np.testing.assert_allclose(quantize.dequantize(again), back, rtol=1e-5)


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
