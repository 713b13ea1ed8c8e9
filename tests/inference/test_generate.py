"""Generation against the full forward pass, and its samplers against NumPy."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WIDE, mesh_of

from gamayun_jax.config import ComputeConfig, ModelConfig, RopeScaling, UserError
from gamayun_jax.inference.decode import QUEUE, Decoder
from gamayun_jax.inference.generator import Generator, bucket, row_length
from gamayun_jax.inference.quantize import dequantize_all, quantize
from gamayun_jax.inference.sampling import Sampling, kept, penalised, sample_token
from gamayun_jax.model import attention, sharding
from gamayun_jax.model.transformer import Transformer, logits
from gamayun_jax.model.weights import abstract_params

MODEL = ModelConfig(
    vocab_size=258, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8,
    d_ff=64, max_seq_len=128, qk_norm=True, qkv_bias=True, tie_embeddings=False,
    rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16), rope_theta=100.0,
)  # fmt: skip
FLOAT32 = ComputeConfig(dtype="float32")
# Where the number of layers says nothing: in steps they are compiled one by one.
SHALLOW = dataclasses.replace(MODEL, num_layers=1)


class Bytes:
    """Byte b is id 2 + b; 0 is BOS, 1 is EOS."""

    vocab_size, prefix_ids, start_id, stop_ids = 258, (0,), 0, (1,)

    def encode(self, text):
        return [2 + b for b in text.encode()]

    def encode_prompt(self, text, literal=False):
        return [*self.prefix_ids, *self.encode(text)]

    def spell(self, ids):
        return bytes(i - 2 for i in ids if i > 1)


def weights(cfg, std=0.3):
    rng = np.random.default_rng(0)

    def draw(path, x):
        norm = float("scale" in jax.tree_util.keystr(path))
        return (norm + std * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


@functools.cache
def generator(cfg=MODEL):
    return Generator(cfg, weights(cfg), mesh_of((1, 1, 1)), Bytes(), FLOAT32)


@functools.cache
def full_forward(cfg):
    model = Transformer(cfg, FLOAT32)

    @jax.jit
    def run(params, tokens_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        ones = jnp.ones_like(tokens_BT)
        x_BTD = model.apply({"params": params}, tokens_BT, positions_BT, ones)
        return logits(params, x_BTD)

    return run


def greedy(cfg, params, prompt, count):
    """Token by token, each from a full forward pass without a cache."""
    ids = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 192), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(full_forward(cfg)(params, row)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[0, 5, 9], [0, *range(3, 24)], [0], [0, 77, 8, 8, 8, 200]]


@pytest.mark.parametrize(
    ("ahead", "sizes"), [(1, [64, 128, 192]), (256, [128, 192]), (1024, [192])]
)
def test_greedy_equals_the_full_forward(monkeypatch, ahead, sizes):
    """Four prompts of different lengths; the cache grows often, or once for all."""
    monkeypatch.setattr("gamayun_jax.inference.generator.AHEAD", ahead)
    grown = []
    longer = Decoder.longer

    def watched(self, state, slots):
        grown.append(slots)
        return longer(self, state, slots)

    monkeypatch.setattr(Decoder, "longer", watched)
    got = generator().generate_ids(PROMPTS, 110, stop_ids=())
    assert grown == sizes
    for ids, prompt in zip(got, PROMPTS, strict=True):
        assert ids == greedy(MODEL, weights(MODEL), prompt, 110)


@pytest.mark.parametrize(("length", "count"), [(3, 100), (16, 129), (100, 128)])
def test_an_answer_takes_four_programs(length, count):
    """One for what comes before a prompt's layers, one for any layer, one for what
    comes after, and one for up to 129 tokens after the prompt; and a small one, which
    is not counted, that makes room for these."""
    one = Generator(MODEL, weights(MODEL), mesh_of((1, 1, 1)), Bytes(), FLOAT32)
    (made,) = one.generate_ids([[7] * length], count, stop_ids=())
    assert len(made) == count
    assert one.decoder.compilations == 4


def test_long_prompts_by_parts_of_their_queries(monkeypatch):
    monkeypatch.setattr(attention, "PART", 8)
    params = weights(SHALLOW)
    made = Generator(SHALLOW, params, mesh_of((1, 1, 1)), Bytes(), FLOAT32)
    for ids, prompt in zip(made.generate_ids(PROMPTS, 4), PROMPTS, strict=True):
        assert ids == greedy(SHALLOW, params, prompt, 4)


def test_any_number_of_stop_ids():
    (made,) = generator().generate_ids([[0, 5, 9]], 12, stop_ids=())
    others = [i for i in range(100) if i not in made][:20]
    end = next(n for n in range(2, 12) if made[n] not in made[:n])
    stops = [*others, made[end]]
    assert generator().generate_ids([[0, 5, 9]], 12, stop_ids=stops) == [made[:end]]


def test_a_row_does_not_depend_on_the_others():
    together = generator().generate_ids(PROMPTS, 20, stop_ids=())
    for ids, prompt in zip(together, PROMPTS, strict=True):
        assert generator().generate_ids([prompt], 20, stop_ids=())[0] == ids


def test_nothing_is_compiled_twice():
    one = Generator(SHALLOW, weights(SHALLOW), mesh_of((1, 1, 1)), Bytes(), FLOAT32)
    for length in (1, 2, 5, 11, 16):
        one.generate_ids([[7] * length], 1 + length % 3, stop_ids=())
    first = one.decoder.compilations
    assert first <= 4  # one bucket: its prompt and what follows
    for sampling in (
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, seed=7),
        Sampling(temperature=0.9, top_k=5),
        Sampling(temperature=0.7, top_p=0.4, min_p=0.1),
    ):
        one.generate_ids([[7, 8, 9]], 3, sampling)
    assert one.decoder.compilations <= first + 4  # with and without filters


@pytest.mark.parametrize(
    "sizes", [pytest.param((2, 2, 2), marks=pytest.mark.slow), (1, 1, 8)]
)
def test_a_mesh_gives_the_same_text(sizes):
    assert on_mesh(sizes) == on_mesh((1, 1, 1))


def test_few_layers_of_a_prompt_wait(monkeypatch):
    """On eight devices many would wait for each other for ever."""
    made = placed(dataclasses.replace(WIDE, num_layers=40), mesh_of((1, 2, 4)))
    layer, caches, waiting = made.decoder._prompt_layer, [], []

    def watched(*args):
        waiting.append(sum(not k.is_ready() for k, _ in caches))
        x_BTD, cache = layer(*args)
        caches.append(cache)
        return x_BTD, cache

    monkeypatch.setattr(made.decoder, "_prompt_layer", watched)
    made.generate_ids([[7] * 60] * 8, 1, stop_ids=())
    assert len(waiting) == 40
    assert max(waiting) <= QUEUE


def placed(cfg, mesh):
    """A generator of random weights that are divided over a mesh."""
    layout = sharding.parameter_shardings(abstract_params(cfg), mesh)
    params = jax.device_put(weights(cfg), layout)
    return Generator(cfg, params, mesh, Bytes(), FLOAT32)


@functools.cache
def on_mesh(sizes):
    made = placed(WIDE, mesh_of(sizes))
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=5)
    prompts = [[5, 6, 7], [9], [11] * 15]
    return made.generate_ids(prompts, 12, sampling, stop_ids=())


def test_what_the_host_reads_is_whole_on_every_device(monkeypatch):
    """Or a process could not read what another one's devices hold."""
    read, asarray = [], np.asarray

    def spy(x, *args, **kwargs):
        if isinstance(x, jax.Array):
            read.append(x.sharding.is_fully_replicated)
        return asarray(x, *args, **kwargs)

    mesh = mesh_of((2, 1, 1))
    placed = jax.device_put(weights(MODEL), sharding.replicated(mesh))
    made = Generator(MODEL, placed, mesh, Bytes(), FLOAT32)
    monkeypatch.setattr(np, "asarray", spy)
    got = made.generate_ids(PROMPTS, 3, stop_ids=())
    monkeypatch.undo()
    assert len(read) >= 2
    assert all(read)
    assert got == generator().generate_ids(PROMPTS, 3, stop_ids=())


def test_stop_ids_end_a_row():
    free = generator().generate_ids(PROMPTS, 30, stop_ids=())
    stop = free[0][7]
    got = generator().generate_ids(PROMPTS, 30, stop_ids=[stop, 257])
    for ids, all_ids in zip(got, free, strict=True):
        ends = [i for i, t in enumerate(all_ids) if t in (stop, 257)]
        assert ids == all_ids[: ends[0] if ends else 30]
    assert generator().generate_ids([PROMPTS[0]], 30, stop_ids=[free[0][0]]) == [[]]
    assert generator().generate_ids([], 30) == []


def test_streamed_pieces_are_whole_characters():
    """The pieces add up to the text; no piece ends within a character."""
    text = "дом 日本 \U0001f468 конец"
    pieces = {0: "", 1: ""}
    made = generator()
    ids = Bytes().encode(text)

    def show(row, piece):
        assert piece
        assert "\ufffd" not in piece
        pieces[row] += piece

    class Spelling(Decoder):
        """Spells the text instead of what the model would say."""

        def __init__(self):
            real = made.decoder
            self.__dict__.update(real.__dict__)
            first_B = np.zeros(2, np.int32)
            self.prefill = lambda *args: (real.prefill(*args)[0], first_B)
            self.decode, self._spelled = self.spell, 0

        def spell(self, weights, state, values, stops, count, program):
            out = np.zeros((2, 16), np.int32)
            part = (ids + [1] * 99)[self._spelled :][: int(count)]
            out[:, : len(part)] = part
            self._spelled += len(part)
            return state, out, len(part)

    spelled = copy.copy(made)
    spelled.decoder = Spelling()
    got = spelled.generate(["a", "b"], 60, on_text=show)
    assert got == [text, text]
    assert pieces == {0: text, 1: text}


def test_streaming_gives_the_returned_text():
    seen = ["", ""]

    def show(row, piece):
        seen[row] += piece

    sampled = Sampling(temperature=1.5, seed=1)
    assert generator().generate(["ab", ""], 40, sampled, on_text=show) == seen


def test_seeds():
    def run(seed):
        return generator().generate_ids(
            [[0, 4]] * 3, 20, Sampling(temperature=1.0, seed=seed), stop_ids=()
        )

    a, b = run(1), run(2)
    assert a == run(1)
    assert a != b
    assert a[0] != a[1]


def test_long_prompts():
    made = generator()
    said = []
    made.message = said.append
    long = "x" * 200
    with pytest.raises(UserError, match="201 tokens, and 20 new ones would pass"):
        made.generate([long], 20)
    cut = made.generate(["y" * 50 + long], 20, truncate=True)
    assert cut == made.generate(["x" * 107], 20)
    assert len(said) == 1
    assert "its beginning is cut off" in said[0]
    with pytest.raises(UserError, match="would pass"):
        made.generate(["a"], 128, truncate=True)
    (ids,) = made.generate_ids([[0]], 5)
    assert made.generate([""], 5) == [Bytes().spell(ids).decode("utf-8", "replace")]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"temperature": float("nan")},
    ],
)
def test_bad_sampling(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)


def test_bad_numbers():
    with pytest.raises(UserError, match="0 new tokens: ask for at least 1"):
        generator().generate_ids([[0]], 0)


@pytest.mark.parametrize("n", range(1, 40))
def test_buckets(n):
    b = bucket(n)
    assert b >= n > b // 2
    assert bucket(n, 16) == max(b, 16)


@pytest.mark.parametrize("n", [129, 192, 200, 1100, 1500, 2000])
def test_long_prompts_are_padded_by_half_at_most(n):
    assert n <= row_length(n, 16) < 1.5 * n


def reference_set(logits, top_k, top_p, min_p):
    """Ids that remain, written from the definitions, one filter after another."""
    ids = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    p = np.exp(logits[ids] - logits[ids].max())
    p /= p.sum()
    mass, nucleus = 0.0, []
    for i, q in zip(ids, p, strict=True):
        if mass >= top_p:
            break
        mass += q
        nucleus.append((i, q))
    return {i for i, q in nucleus if q >= min_p * p[0]}


FILTERS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (9, 0.8, 0.1),
           (1, 1.0, 0.0), (0, 1e-6, 0.0), (0, 1.0, 1.0)]  # fmt: skip


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
def test_filters(top_k, top_p, min_p):
    """The right tokens remain, and are drawn in their right proportions."""
    temperature, draws = 0.7, 4000
    x = np.random.default_rng(3).normal(size=40).astype(np.float32) * 1.5
    want = reference_set(x / temperature, top_k, top_p, min_p)
    count = kept(-np.sort(-x / temperature)[None], top_k or 99, top_p, min_p)
    assert int(count[0]) == len(want)
    sampling = Sampling(1.0, temperature, top_k, top_p, min_p, seed=4)
    many = jnp.tile(x, (draws, 1))
    got = np.asarray(drawing(many, sampling.values(), sampling.program))
    assert set(got.tolist()) <= want
    p = np.array([np.exp(x[i] / temperature) if i in want else 0.0 for i in range(40)])
    p /= p.sum()
    error = np.abs(np.bincount(got, minlength=40) / draws - p)
    assert (error < 5 * np.sqrt(p * (1 - p) / draws) + 1e-9).all()


@functools.partial(jax.jit, static_argnums=2)
def drawing(logits_BV, values, program):
    return sample_token(logits_BV, jnp.zeros_like(logits_BV, bool), values, 0, program)


def test_repetition_penalty():
    x = np.float32([[1.0, -1.0, 3.0, 0.5]])
    seen = np.array([[True, True, False, False]])
    np.testing.assert_allclose(penalised(x, seen, 2.0), [[0.5, -2.0, 3.0, 0.5]])
    # Greedy decoding under a huge penalty repeats neither itself nor the prompt.
    prompt = [0, 5, 9]
    strong = Sampling(repetition_penalty=1e6)
    (ids,) = generator().generate_ids([prompt], 40, strong, stop_ids=())
    assert len({*ids, *prompt}) == 43


@pytest.mark.slow
def test_quantised_weights_generate_what_their_floats_do():
    params = weights(SHALLOW)
    for bits in (8, 4):
        small = jax.jit(quantize, static_argnums=1)(params, bits)
        mesh = mesh_of((1, 1, 1))
        a, b = (
            Generator(SHALLOW, p, mesh, Bytes(), FLOAT32).generate_ids(PROMPTS, 8)
            for p in (small, dequantize_all(small))
        )
        assert a == b


def test_bfloat16():
    compute = dataclasses.replace(FLOAT32, dtype="bfloat16")
    made = Generator(SHALLOW, weights(SHALLOW), mesh_of((1, 1, 1)), Bytes(), compute)
    assert len(made.generate_ids(PROMPTS, 4, stop_ids=())[3]) == 4
