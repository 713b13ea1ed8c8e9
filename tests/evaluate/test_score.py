"""The batched scorer against one forward pass per choice, and its invariances."""

import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WIDE, mesh_of

from gamayun_jax.config import ComputeConfig, UserError
from gamayun_jax.evaluate.loglikelihood import (
    Request,
    Scorer,
    batch_size,
    fill_rows,
    row_length,
)
from gamayun_jax.model.transformer import Transformer, logits
from gamayun_jax.model.weights import abstract_params

FLOAT32, BFLOAT16 = (ComputeConfig(dtype=k) for k in ("float32", "bfloat16"))


@functools.cache
def weights():
    rng = np.random.default_rng(0)

    def draw(path, x):
        norm = float("scale" in jax.tree_util.keystr(path))
        return (norm + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(WIDE))


@functools.cache
def scorer(shape=(1, 1, 1), window=None):
    return Scorer(WIDE, weights(), mesh_of(shape), FLOAT32, window, batch_tokens=512)


@jax.jit
def forward(params, ids_1T):
    model, T = Transformer(WIDE, FLOAT32), ids_1T.shape[1]
    ones = jnp.ones_like(ids_1T)
    x = model.apply({"params": params}, ids_1T, jnp.arange(T)[None], ones)
    return jax.nn.log_softmax(logits(params, x)[0], -1)


@functools.cache
def logprobs(*ids):
    """Of the token after each of the ids: a forward pass of their own."""
    inputs = np.zeros((1, 64), np.int32)  # causal: what follows does not matter
    inputs[0, : len(ids)] = ids
    return np.asarray(forward(weights(), inputs), np.float64)[: len(ids)]


def alone(context, choice, window=WIDE.max_seq_len):
    """Log-probability of one choice and whether it is greedy: a forward of its own."""
    ids = [*context, *choice][-(window + 1) :]
    logp = logprobs(*ids[:-1])[-len(choice) :]
    found = logp[np.arange(len(choice)), choice]
    return found.sum(), bool((logp.argmax(-1) == choice).all())


def requests(count=40, seed=1):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(0, WIDE.vocab_size, rng.integers(low, high)).tolist()

    return [
        Request(ids(1, 30), [ids(1, 9) for _ in range(rng.integers(1, 6))])
        for _ in range(count)
    ]


def flat(scores):
    return np.concatenate([s.logprobs for s in scores])


def test_equals_each_choice_alone():
    asked = requests()
    # Most likely continuations too, or nothing would be greedy.
    for k in range(3):
        choice = []
        for _ in range(3):
            logp = logprobs(*asked[k].context, *choice)
            choice.append(int(logp[-1].argmax()))
        asked[k] = Request(asked[k].context, [*asked[k].continuations, choice])
    found = scorer().score(asked)
    assert len(found) == len(asked)
    for request, score in zip(asked, found, strict=True):
        expected = [alone(request.context, c) for c in request.continuations]
        np.testing.assert_allclose(score.logprobs, [e[0] for e in expected], rtol=1e-5)
        assert score.greedy.tolist() == [e[1] for e in expected]
        assert score.dropped == 0
    assert sum(s.greedy.sum() for s in found) >= 3


def test_order_and_company_do_not_matter():
    asked = requests()
    base = flat(scorer().score(asked))
    order = np.random.default_rng(3).permutation(len(asked))
    shuffled = scorer().score([asked[i] for i in order])
    back = [shuffled[i] for i in np.argsort(order)]
    np.testing.assert_allclose(flat(back), base, rtol=1e-5)
    np.testing.assert_array_equal(flat(scorer().score(asked)), base)
    single = [Request(r.context, [c]) for r in asked[:10] for c in r.continuations]
    np.testing.assert_allclose(
        flat(scorer().score(single)), flat(scorer().score(asked[:10])), rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)])
def test_eight_devices_equal_one(shape):
    asked = requests()
    np.testing.assert_allclose(
        flat(scorer(shape).score(asked)), flat(scorer().score(asked)), rtol=1e-5
    )


def test_bfloat16_ranks_like_float32():
    """Within what 8 bits of mantissa give, and a context shared or not is the same."""
    asked = requests()
    half = Scorer(WIDE, weights(), mesh_of((1, 1, 1)), BFLOAT16, batch_tokens=512)
    found, exact = flat(half.score(asked)), flat(scorer().score(asked))
    assert np.abs(found / exact - 1).max() < 0.03
    assert np.corrcoef(found, exact)[0, 1] > 0.9999
    single = [Request(r.context, [c]) for r in asked for c in r.continuations]
    np.testing.assert_allclose(flat(half.score(single)), found, rtol=0.01)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_weights_are_cast_once_and_to_the_same_bits(shape):
    """As they would be in every batch; norms, which compute in float32, are not."""
    asked = requests(10)
    half = Scorer(WIDE, weights(), mesh_of(shape), BFLOAT16, batch_tokens=512)
    found = flat(half.score(asked))
    kinds = jax.tree.map(lambda w, c: (w.dtype, c.dtype), weights(), half.params)
    for path, (given, cast) in jax.tree_util.tree_leaves_with_path(
        kinds, is_leaf=lambda x: isinstance(x, tuple)
    ):
        norm = "scale" in jax.tree_util.keystr(path)
        assert (given, cast) == (jnp.float32, jnp.float32 if norm else jnp.bfloat16)
    half._params = weights()
    np.testing.assert_array_equal(flat(half.score(asked)), found)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Run with two devices each; every process gets all results."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys, test_score; test_score.score_as_process(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(port), str(tmp_path)]
    children = [subprocess.Popen([*command, str(i)], env=env) for i in range(2)]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    expected = flat(scorer().score(requests()))
    for i in range(2):
        found = np.load(tmp_path / f"{i}.npy")
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def score_as_process(port, folder, index):
    """What each of the two processes does."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    mesh = mesh_of((2, 2, 1))
    assert sorted(d.process_index for d in mesh.devices.flat) == [0, 0, 1, 1]
    found = Scorer(WIDE, weights(), mesh, FLOAT32, batch_tokens=512).score(requests())
    np.save(f"{folder}/{index}.npy", flat(found))


def test_long_contexts_lose_their_beginning_and_are_counted():
    rng = np.random.default_rng(5)
    context = rng.integers(0, 200, 50).tolist()
    choices = [rng.integers(0, 200, n).tolist() for n in (1, 4, 20)]
    found = scorer(window=32).score([Request(context, choices)])[0]
    expected = [alone(context, c, window=32)[0] for c in choices]
    np.testing.assert_allclose(found.logprobs, expected, rtol=1e-5)
    assert found.dropped == 50 - (32 + 1 - 20)
    one = scorer(window=32).score([Request(context[:10], choices)])[0]
    assert one.dropped == 0


def test_many_choices_share_rows():
    """More choices than a row has places, and single tokens after a short context."""
    choices = [[i] for i in range(200)] + [[i, i, i] for i in range(200)]
    found = scorer().score([Request([7, 8], choices)])[0]
    expected = [alone([7, 8], c)[0] for c in choices]
    np.testing.assert_allclose(found.logprobs, expected, rtol=1e-4)
    assert np.exp(found.logprobs[:200]).sum() == pytest.approx(1.0, abs=1e-4)


def test_rolling_scores_every_token_once():
    rng = np.random.default_rng(6)
    texts = [rng.integers(0, 200, n).tolist() for n in (0, 1, 31, 32, 33, 100)]
    found = scorer(window=32).rolling(texts, prefix=3)
    for text, value in zip(texts, found, strict=True):
        stream, expected, at = [3, *text], 0.0, 1
        while at < len(stream):
            begin = 0 if at == 1 else at - 16
            end = min(begin + 33, len(stream))
            expected += alone(stream[begin:at], stream[at:end])[0]
            at = end
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_what_is_compiled_depends_on_lengths_only():
    fresh = Scorer(WIDE, weights(), mesh_of((1, 1, 1)), FLOAT32, batch_tokens=512)
    for seed in range(1, 4):
        fresh.score(requests(seed=seed))
    once = fresh.compilations
    for seed in range(4, 8):  # as it were, other languages
        fresh.score(requests(seed=seed))
    assert fresh.compilations == once <= 4


@pytest.mark.parametrize("compute", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_parameters_in_numpy_are_copied_to_the_devices_once(shape, compute):
    fresh = Scorer(WIDE, weights(), mesh_of(shape), compute)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(fresh.params))
    on_devices = jax.tree.map(jnp.asarray, weights())
    same = Scorer(WIDE, on_devices, mesh_of(shape), compute)
    for one, other in zip(fresh.score(requests()), same.score(requests()), strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_few_or_short_texts_are_not_padded_to_the_largest_batch():
    fresh = Scorer(WIDE, weights(), mesh_of((1, 1, 1)), FLOAT32)

    def shape_of(count, length):
        asked = [Request([1], [[2] * length]) for _ in range(count)]
        parts = [p for i, r in enumerate(asked) for p in fresh._parts(i, r, i)[0]]
        return [(B, T) for _, B, T, _ in fresh._batches(parts)]

    assert shape_of(1, 20) == [(1, 32)]
    assert shape_of(1, 60) == [(1, 64)]
    assert shape_of(2, 60) == [(1, 128)]
    assert shape_of(16, 60) == [(8, 128)]
    assert shape_of(64, 60) == [(32, 128)]
    for count in range(2, 200):  # one program, also where the last row is a short one
        assert len(set(shape_of(count, 60))) == 1
    for most in (1, 3, 16, 32):
        for rows in range(1, 80):
            size = batch_size(rows, most)
            assert size <= most
            assert -(-rows // size) * size < 2 * rows
    found = fresh.score([Request([1], [[2, 3]])])[0]
    assert found.logprobs[0] == pytest.approx(alone([1], [2, 3])[0], rel=1e-5)


def test_progress_counts_every_continuation():
    asked, seen = requests(), []
    scorer().score(asked, progress=seen.append)
    assert sum(seen) == sum(len(r.continuations) for r in asked)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [[1]]), "empty context"),
        (Request([1], []), "no continuation"),
        (Request([1], [[2], []]), "empty one"),
        (Request([1], [[200]]), "another tokenizer"),
        (Request([-1], [[2]]), "has token -1, beyond"),
        (Request([1], [[2] * 65]), "more than the window of 64"),
    ],
)
def test_refuses_what_cannot_be_scored(request_, message):
    with pytest.raises(UserError, match=message):
        scorer().score([Request([1], [[2]]), request_])
    assert scorer().score([]) == []


def test_rows_waste_little():
    rng = np.random.default_rng(7)

    class Part:
        def __init__(self, size):
            self.size = size

    parts = [Part(int(n)) for n in rng.integers(20, 300, 500)]
    rows = fill_rows(parts)
    assert sorted(p.size for row in rows for p in row) == sorted(p.size for p in parts)
    used = [sum(p.size for p in row) for row in rows]
    lengths = [row_length(row[0].size) for row in rows]
    assert all(u <= n for u, n in zip(used, lengths, strict=True))
    assert sum(used) > 0.9 * sum(lengths)
    assert [row_length(n) for n in (1, 128, 129, 192, 193, 257, 385)] == [
        128, 128, 192, 192, 256, 384, 512,
    ]  # fmt: skip
