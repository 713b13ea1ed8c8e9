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
from conftest import runs_on, slow_but

from gamayun_jax import cli, train
from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data.model_tokenizer import open_tokenizer
from gamayun_jax.evaluate import stored_model
from gamayun_jax.inference import quantize, rounding
from gamayun_jax.interop import load_model
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import parameter_count, weights_of
from gamayun_jax.training.model_folder import save_model

SHAPES = {  # one matrix of each kind, stacked over 2 layers but for the embedding
    "embedding": (50, 128), "q": (2, 128, 4, 16), "v": (2, 128, 4, 16),
    "o": (2, 4, 64, 48), "gate": (2, 192, 40), "down": (2, 128, 48),
}  # fmt: skip
BITS_A_WEIGHT = {4: 4.375, 5: 5.375, 6: 6.1875}  # with a byte and a half for each group


@pytest.mark.parametrize("name", SHAPES)
def test_int8_is_at_most_half_a_step_off(name):
    """Against float64."""
    shape, summed = SHAPES[name], quantize.MATRICES[name].summed_axes
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[(0,) * len(shape)] = 50.0  # an outlier costs its own channel only
    found = quantize.quantize_matrix(jnp.asarray(w), summed, 8)
    assert found["codes"].dtype == jnp.int8
    back = np.asarray(quantize.dequantize(found))
    step = np.abs(w).astype(np.float64).max(axis=summed, keepdims=True) / 127
    assert (np.abs(back - w) <= 0.501 * step).all()
    again = quantize.quantize_matrix(jnp.asarray(back), summed, 8)
    np.testing.assert_allclose(quantize.dequantize(again), back, rtol=1e-5)


@pytest.mark.parametrize("name", slow_but("o", of=SHAPES))
def test_int4_misses_what_its_steps_are_apart(name):
    """In each group no more than even steps over its range would; no weight by more
    than the part of the range that the least grid leaves out."""
    shape, summed = SHAPES[name], quantize.MATRICES[name].summed_axes
    bits, axis = quantize.bits_of(name), len(shape) + summed[0]
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w[(0,) * len(shape)] = 50.0  # an outlier costs its own group only
    found = quantize.quantize_matrix(jnp.asarray(w), summed, bits)
    groups = shape[axis] // quantize.GROUPS[bits]
    assert found["scale"].shape[axis] == groups
    assert 8 * quantize.size_bytes(found) == BITS_A_WEIGHT[bits] * w.size
    off = np.asarray(quantize.dequantize(found), np.float64) - w
    off, cut = (
        np.moveaxis(x, axis, 0).reshape(groups, quantize.GROUPS[bits], -1)
        for x in (off, w.astype(np.float64))
    )
    length = np.ptp(np.concatenate([cut, 0 * cut], 1), axis=1, keepdims=True)
    step = length / (2**bits - 2 ** (bits - 4))
    left_out = (1 - min(quantize.SHRUNK)) * length
    assert (np.abs(off) <= left_out + 0.73 * step).all()
    # Squared, even steps miss a twelfth; scales are up to 4.5 % above them.
    assert np.square(off / step).mean() <= 1.09 / 12
    assert np.square(off)[..., 1:].mean() < 0.02  # apart from the outlier's group


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_of_bits_hold_every_code(bits, axis):
    """Also where an odd number of groups leaves half a byte of zero points unused."""
    rng = np.random.default_rng(bits)
    codes = rng.permutation(24 * 6 * 24) % 2**bits
    codes = codes.astype(np.uint8).reshape(24, 6, 24).swapaxes(1, 2 if axis < 2 else 1)
    shape = [*codes.shape]
    shape[axis] //= 8
    scale = quantize.scale_of(jnp.asarray(rng.integers(0, 256, shape), jnp.uint8))
    zero = rng.integers(0, 16, shape).astype(np.uint8) << (bits - 4)
    leaf = quantize.packed(jnp.asarray(codes), scale, jnp.asarray(zero), axis, bits)
    assert {x.dtype.name for x in leaf.values()} == {"uint8"}
    held = leaf["codes"].nbytes + (leaf["high"].nbytes if bits > 4 else 0)
    assert 8 * held == bits * codes.size
    scale, zero = (np.repeat(np.asarray(x, np.float64), 8, axis) for x in (scale, zero))
    expected = (codes - zero) * scale
    np.testing.assert_allclose(quantize.dequantize(leaf), expected, rtol=1e-6)


def correlated(rng, rows, size=128):
    """Inputs that go together, of which one is always 0."""
    x_RI = rng.normal(size=(rows, 12)) @ rng.normal(size=(12, size))
    x_RI += 0.1 * rng.normal(size=x_RI.shape)
    x_RI[:, 5] = 0
    return x_RI.astype(np.float32)


@pytest.mark.parametrize("bits", [4, 5])
def test_rounding_by_inputs_makes_the_products_better(bits):
    rng = np.random.default_rng(0)
    w_NHD = rng.normal(size=(2, 64, 24)).astype(np.float32)
    summed = quantize.MATRICES["o"].summed_axes
    x_RI = correlated(rng, 512)
    factor = rounding.inverse_factor(x_RI.T @ x_RI)
    h = (x_RI.T @ x_RI).astype(np.float64)
    mean = h.trace() / 128
    h[5, 5] = 1
    h += rounding.DAMPING * mean * np.eye(128)
    np.testing.assert_allclose(factor.T @ factor @ h, np.eye(128), atol=1e-3)
    nearest = quantize.quantize_matrix(w_NHD, summed, bits)
    better = rounding.round_matrix(w_NHD, summed, factor, bits)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), better) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nearest
    )

    def error(leaf):
        off = (np.asarray(quantize.dequantize(leaf)) - w_NHD).reshape(128, 24)
        return np.square(x_RI @ off).sum()

    assert error(better) < 0.25 * error(nearest)


def test_the_grid_is_no_worse_than_the_widest(monkeypatch):
    """In the error that is weighted by what the inputs make of it."""
    rng = np.random.default_rng(0)
    w_GO = jnp.asarray(rng.standard_t(3, size=(32, 200)), jnp.float32)
    importance_G1 = jnp.asarray(rng.uniform(0.1, 10, (32, 1)), jnp.float32)

    def errors_O():
        scale_1O, zero_1O = quantize.grid(w_GO, 0, 4, importance_G1)
        codes_GO = quantize.encode(w_GO, scale_1O, zero_1O, 4)
        back_GO = quantize.decode(codes_GO, scale_1O, zero_1O)
        return np.asarray(importance_G1[:, 0] @ jnp.square(back_GO - w_GO))

    best_O = errors_O()
    monkeypatch.setattr(quantize, "SHRUNK", (1.0,))
    widest_O = errors_O()
    assert (best_O <= widest_O).all()
    assert best_O.sum() < 0.95 * widest_O.sum()


def test_least_squares_make_good_what_the_inputs_lost():
    """On rows that it has not seen, before rounding and after."""
    rng = np.random.default_rng(0)
    x_RI = correlated(rng, 2048)
    w_IO = jnp.asarray(rng.normal(size=(128, 24)), jnp.float32)
    # Inputs of rounded layers: turned a little, and with noise.
    turned = np.eye(128) + 0.05 * rng.normal(size=(128, 128))
    ours_RI = (x_RI @ turned + 0.1 * rng.normal(size=x_RI.shape)).astype(np.float32)
    beside_RO = (0.5 * ours_RI @ rng.normal(size=(128, 24))).astype(np.float32)
    seen, other = slice(None, 1024), slice(1024, None)
    x, ours = x_RI[seen], ours_RI[seen]
    factor_II = rounding.inverse_factor(ours.T @ ours)
    sums = [ours.T @ (x - ours), ours.T @ beside_RO[seen]]
    moved_IO = rounding.least_squares(w_IO, factor_II, sums)

    def missed(matrix_IO):
        wanted = x_RI[other] @ w_IO + beside_RO[other]
        return np.square(ours_RI[other] @ matrix_IO - wanted).sum()

    def rounded(matrix_IO):
        found = rounding.round_matrix(matrix_IO, (-2,), factor_II, 4)
        return quantize.dequantize(found)

    assert missed(moved_IO) < 0.2 * missed(w_IO)
    assert missed(rounded(moved_IO)) < 0.5 * missed(rounded(w_IO))


def test_columns_are_rounded_as_the_paper_has_it():
    """Against the algorithm in float64, a row at a time with the inverse itself."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(64, 8)).astype(np.float32)
    x = rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))
    factor = rounding.inverse_factor(x.T @ x)
    found = rounding.round_matrix(jnp.asarray(w), (-2,), factor, 4)

    def halves(packed):
        packed = np.asarray(packed)
        return np.stack([packed & 15, packed >> 4], 1).reshape(-1, 8)

    codes, zero = halves(found["codes"]), halves(found["zero"]).astype(np.float64)
    scale = np.asarray(quantize.scale_of(found["scale"]), np.float64)
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
    for bits in (8, 6, 5, 4):
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


def former(leaf, summed, group):
    """As int4 once was, with the weights that it stands for: symmetric in groups of 64,
    or, later, with zero points in groups that the meta names."""
    axis = leaf.ndim + summed[0]
    size = math.gcd(leaf.shape[axis], group or 64)
    cut = leaf.reshape(*leaf.shape[:axis], -1, size, *leaf.shape[axis + 1 :])
    if group:
        high, low = cut.max(axis + 1, keepdims=True), cut.min(axis + 1, keepdims=True)
        scale = jnp.asarray((high - low) / 15, jnp.bfloat16)
        zero = np.round(-low / scale.astype(jnp.float32)).clip(0, 15).astype(np.uint8)
    else:
        scale = jnp.asarray(np.abs(cut).max(axis + 1, keepdims=True) / 7)
        zero = np.full(scale.shape, 8, np.uint8)
    codes = np.round(cut / scale.astype(jnp.float32) + zero).clip(0, 15)
    floats = ((codes - zero) * scale.astype(jnp.float32)).reshape(leaf.shape)
    codes = np.moveaxis(np.asarray(codes, np.uint8).reshape(leaf.shape), axis, 0)
    packed = np.moveaxis(codes[::2] | codes[1::2] << 4, 0, axis)
    small = {"codes": jnp.asarray(packed), "scale": scale.squeeze(axis + 1)}
    if group:
        small["zero"] = jnp.asarray(zero.squeeze(axis + 1))
    return small, floats


def test_former_groups_of_four_have_shapes(trained):
    """An axis of 12 in groups of 4, which int4 of today refuses."""
    _, params, meta, _ = load_model.load_params(trained)
    mesh = sharding.replicated(sharding.make_mesh(c.MeshConfig(), jax.devices()[:1]))

    def shaped(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh)

    abstract = jax.tree.map(shaped, params)
    odd = jax.ShapeDtypeStruct((2, 12, 16), jnp.float32, sharding=mesh)
    abstract["layers"]["mlp"]["down"] = odd
    with pytest.raises(UserError, match="groups of 8 or more"):
        jax.eval_shape(lambda p: quantize.quantize(p, 4), abstract)
    old = dataclasses.replace(meta, bits=4, group=32, layout=None)
    found = quantize.abstract_quantised(abstract, old)["layers"]["mlp"]["down"]
    assert {k: v.shape for k, v in found.items()} == {
        "codes": (2, 6, 16),
        "scale": (2, 3, 16),
        "zero": (2, 3, 16),
    }


@pytest.mark.slow
@pytest.mark.parametrize("group", [None, 32])
def test_a_folder_of_before_opens(trained, tmp_path, group):
    cfg, params, meta, _ = load_model.load_params(trained)
    small, floats = quantize.quantize(params, 8), {}
    for part in ("attention", "mlp"):
        for name, w in params["layers"][part].items():
            if name in quantize.MATRICES:
                summed = quantize.MATRICES[name].summed_axes
                leaf, floats[part, name] = former(np.asarray(w), summed, group)
                small["layers"][part][name] = leaf
    old = dataclasses.replace(meta, bits=4, group=group)
    tokenizer = open_tokenizer(trained, meta.tokenizer, cfg.data.corpus)
    save_model(small, old, tokenizer, tmp_path / "old")
    found = load_model.load_params(tmp_path / "old").params
    assert len(floats) == 7
    for (part, name), w in floats.items():
        np.testing.assert_allclose(found["layers"][part][name], w, rtol=1e-6)
    kept = load_model.load_params(tmp_path / "old", quantised=True).params
    jax.tree.map(np.testing.assert_array_equal, kept, small)


@pytest.fixture(scope="module")
def rounded(trained):
    """The run's model in int4 by random text, on eight devices; and that text."""
    with runs_on(8):
        cfg, params, _, eight = load_model.load_params(trained)
    assert eight.size == 8
    rows = np.random.default_rng(0).integers(4, cfg.model.vocab_size, (20, 32))
    rows = rows.astype(np.int32)
    return rounding.quantize_by_text(cfg, params, rows, eight), rows


@pytest.mark.slow
def test_one_device_and_eight_round_alike(trained, rounded):
    """All but what float32 sums in another order turn over at a half."""
    cfg, params, *_ = load_model.load_params(trained)
    one = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    host = jax.device_get(params)
    a, rows = rounded
    b = rounding.quantize_by_text(cfg, host, rows, one)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), quantize.quantize(host, 4))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), a) == shapes
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.mean(np.asarray(x) == np.asarray(y)) > 0.98


@pytest.mark.slow
def test_int4_is_stored_in_the_bits_that_are_stated(trained, rounded, tmp_path):
    cfg, _, meta, _ = load_model.load_params(trained)
    small, _ = rounded
    meta = dataclasses.replace(meta, bits=4, layout=quantize.LAYOUT)
    tokenizer = open_tokenizer(trained, meta.tokenizer, cfg.data.corpus)
    save_model(small, meta, tokenizer, tmp_path / "small")
    back = load_model.load_params(tmp_path / "small", quantised=True).params
    jax.tree.map(np.testing.assert_array_equal, back, small)
    stated = quantize.size_bytes(small)
    assert stated == sum(np.asarray(x).nbytes for x in jax.tree.leaves(back))
    expected = 0
    for weight in weights_of(cfg.model):
        shape, bits = weight.full_shape(cfg.model), weight.kind.fewest_bits
        if not bits:
            expected += 4 * math.prod(shape)
            continue
        size = shape[weight.summed_axes[0]]
        groups = size // math.gcd(size, quantize.GROUPS[bits])
        codes = size // 2 + math.ceil(size * (bits - 4) / 8)
        column = codes + groups + math.ceil(groups / 2)  # scales, zero points
        expected += math.prod(shape) // size * column
    assert stated == expected


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
        held = load_model.load_params(out, quantised=True)
        weights = parameter_count(held.cfg.model)
        each = 8 * quantize.size_bytes(held.params) / weights
        assert f" bytes of weights, {each:.2f} bits each" in said
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
    # One token more than the window: nothing of it is written before it is refused.
    assert cli.main(["generate", model, "--prompt", "a", "--max-tokens", "999"]) == 2
    said = capfd.readouterr()
    assert "would pass model.max_seq_len" in said.err
    assert not said.out
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
