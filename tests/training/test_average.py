"""Averages of checkpoints: weights, bits, what reads the result, what is refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gamayun_jax import cli, train
from gamayun_jax import config as c
from gamayun_jax.config import UserError
from gamayun_jax.data.tokenizer import Tokenizer
from gamayun_jax.evaluate import stored_model
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.weights import abstract_params
from gamayun_jax.training import average, model_folder, resume
from gamayun_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    TrainState,
)
from gamayun_jax.training.run_meta import RunMeta
from gamayun_jax.training.step import abstract_state

SCHEMES = ("uniform", "linear", "1-sqrt")
STEPS = (3, 6, 7, 9, 12, 13)  # those that the small config's run saves


def random_params(cfg, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(cfg)
    )


def write_run(folder, cfg, params, **fields):
    """A run folder with checkpoints of parameters, by step."""
    tokenizer = Tokenizer(f"{cfg.data.corpus}/tokenizer.model")
    store = Checkpoints(folder / "checkpoints", cfg.checkpoint)
    lineage = {"run": "small", "events": [], "stages": [], **fields.pop("lineage", {})}
    for step, tree in params.items():
        meta = RunMeta(
            step,
            cfg,
            tokens=step * cfg.tokens_per_step,
            tokenizer=tokenizer.fingerprint,
            lineage=lineage,
            **fields,
        )
        store.save(TrainState(jnp.int32(step), tree, {}), meta)
        store.wait()
    store.close()
    tokenizer.write(folder)
    return folder


@pytest.fixture(scope="module")
def params(config):
    """Step -> random parameters."""
    return {step: random_params(config.model, step) for step in STEPS}


@pytest.fixture(scope="module")
def run(config, params, tmp_path_factory):
    """A run folder with a checkpoint of random parameters at each step."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", config, params)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A run folder that training wrote."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    assert train.train(config, folder, log=lambda _: None) == 0
    return folder


def reference(params, weights):
    """The weighted sum in float64."""
    trees = [params[step] for step in weights]

    def one(*leaves):
        pairs = zip(leaves, weights.values(), strict=True)
        return sum(np.float64(x) * w for x, w in pairs)

    return jax.tree.map(one, *trees)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("steps", [(1, 2), (10, 20, 30, 40, 50), STEPS, range(1, 101)])
def test_weights_are_positive_and_sum_to_one(scheme, steps):
    found = average.average_weights(steps, scheme)
    assert len(found) == len(steps)
    assert min(found) > 0
    assert sum(found) == pytest.approx(1, abs=1e-12)


def test_weights_as_written():
    steps = (10, 20, 30, 40)
    assert average.average_weights(steps, "uniform") == [0.25] * 4
    assert average.average_weights(steps, "linear") == [0.1, 0.2, 0.3, 0.4]
    s = 1 - np.sqrt(np.arange(5) / 4)
    found = average.average_weights(steps, "1-sqrt")
    np.testing.assert_allclose(found, s[:-1] - s[1:], rtol=1e-12)


def schedules(n):
    """By scheme, what the update before the k-th of n checkpoints is scaled by."""
    k = np.arange(n)
    return {
        "uniform": 1 - k / n,
        "linear": 1 - k * (k + 1) / (n * (n + 1)),
        "1-sqrt": 1 - np.sqrt(k / n),
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_average_is_the_path_with_its_updates_scaled(scheme):
    """Of p_k = k d, and of updates that are all different."""
    n = 8
    weights = average.average_weights(range(5, 5 + 3 * n, 3), scheme)
    scale = schedules(n)[scheme]
    np.testing.assert_allclose(
        np.dot(weights, np.arange(n) * 0.25), 0.25 * scale[1:].sum(), rtol=1e-12
    )
    updates = np.random.default_rng(0).normal(size=(n, 5))
    path = np.cumsum(updates, axis=0)
    expected = updates[0] + scale[1:] @ updates[1:]
    np.testing.assert_allclose(weights @ path, expected, rtol=1e-12, atol=1e-12)


def test_a_decay_is_by_tokens():
    """A checkpoint between two divides the weight where the decay stands there."""
    even = average.average_weights((0, 4, 8, 12), "1-sqrt")
    more = average.average_weights((0, 4, 5, 8, 12), "1-sqrt")
    x = np.array([0, 4, 5, 8, 12, 15]) / 15  # 12 steps are four of five parts
    np.testing.assert_allclose(more, np.diff(np.sqrt(x)), rtol=1e-12)
    assert even[0] > even[1] > even[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_against_float64(scheme, run, params):
    meta = average.average_meta(run, last=4, scheme=scheme)
    found = average.average_of(run, meta)
    weights = dict(zip(meta.averaged["steps"], meta.averaged["weights"], strict=True))
    assert list(weights) == list(STEPS[-4:])
    expected = reference(params, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        found,
        expected,
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_the_same_bits_on_any_devices(sizes, run, config, wide_config, tmp_path):
    if sizes == (2, 2, 2):  # a model of which every axis divides, as its batch does
        cfg = dataclasses.replace(config, model=wide_config.model)
        trees = {s: random_params(cfg.model, s) for s in STEPS}
        run = write_run(tmp_path / "wide", cfg, trees)
    else:
        cfg = config
    weights = dict(zip(STEPS, average.average_weights(STEPS, "1-sqrt"), strict=True))
    found = []
    for mesh in (
        sharding.make_mesh(c.MeshConfig(*sizes)),
        sharding.make_mesh(c.MeshConfig(1, 1, 1), jax.devices()[:1]),
    ):
        abstract = sharding.place_abstract(abstract_params(cfg.model), mesh)
        store = Checkpoints(run / "checkpoints", read_only=True)
        found.append(average.average_params(store, weights, abstract))
        store.close()
    assert len(found[0]["embedding"].sharding.device_set) == 8
    assert not found[0]["layers"]["mlp"]["gate"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, *found)
    alone = average.average_of(run, average.average_meta(run, 6, scheme="1-sqrt"))
    jax.tree.map(np.testing.assert_array_equal, found[1], alone)


def test_one_array_at_a_time():
    """What was read before is gone when the next one is read."""
    made = []

    class Store:
        def readers(self, at, abstract):
            def read():
                assert all(x.is_deleted() for x in made)
                made.append(jnp.full(1000, at, jnp.float32))
                return made[-1]

            return {"a": read, "b": read}

    found = average.average_params(Store(), {2: 0.25, 4: 0.75}, None)
    assert float(found["a"][0]) == float(found["b"][-1]) == 3.5
    assert len(made) == 4


def test_what_is_chosen(run, config):
    def chosen(path=run, **options):
        return average.average_meta(path, **options).averaged["steps"]

    each = config.tokens_per_step
    assert chosen(last=2) == [12, 13]
    assert chosen(last=6) == list(STEPS)
    assert chosen(window=4 * each) == [9, 12, 13]
    assert chosen(window=4 * each - 1) == [12, 13]
    assert chosen(window=10**400) == list(STEPS)
    assert chosen(last=3, until=11) == [6, 7, 9]
    assert chosen(path=run / "checkpoints" / "9", last=2) == [7, 9]


def test_the_meta_says_what_was_averaged(run):
    before = Checkpoints(run / "checkpoints", read_only=True).meta(12)
    meta = average.average_meta(run, last=2, scheme="linear", until=12)
    assert (meta.step, meta.tokens) == (12, before.tokens)
    expected = {"scheme": "linear", "steps": [9, 12], "weights": [1 / 3, 2 / 3]}
    assert meta.averaged == expected
    assert meta.lineage["events"][-1] == {"event": "averaged", "step": 12, **expected}
    assert {**meta.lineage, "events": []} == {**before.lineage, "events": []}
    # Others do not know of it.
    assert before.averaged is None
    assert "averaged" not in before.to_json()
    assert RunMeta.from_json(meta.to_json(), "here").averaged == expected


@pytest.mark.slow
def test_the_command_line(trained, config, tmp_path, capfd):
    """All that reads a checkpoint reads an average, and a run begins from it."""
    out = tmp_path / "out"
    words = ["average", str(trained), str(out), "--last=3", "--weights=1-sqrt"]
    assert cli.main(words) == 0
    said = capfd.readouterr().out
    assert "the average of 3 checkpoints" in said
    assert "step 12: " in said
    assert not list(tmp_path.glob(".*"))
    # It stands on its own, for it has its tokenizer.
    loaded = load_params(out)
    store = Checkpoints(trained / "checkpoints", read_only=True)
    host = jax.device_get(loaded.params)
    trees = {s: store.restore_params(s, loaded.params) for s in (9, 12, 13)}
    weights = dict(zip(trees, loaded.meta.averaged["weights"], strict=True))
    expected = reference(jax.device_get(trees), weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), host, expected
    )
    score = stored_model.evaluate_heldout(out)[0]
    assert score["step"] == 13
    last = stored_model.evaluate_heldout(trained)[0]
    for result in (score, last):
        assert 0 < result["sets"]["udhr"]["macro"]["bits_per_byte"] < 9
    assert score["sets"] != last["sets"]
    argv = ["generate", str(out), "--prompt", "The ", "--max-tokens", "3"]
    assert cli.main(argv) == 0
    assert cli.main(["align", str(out)]) == 0
    assert cli.main(["quantize", str(out), str(tmp_path / "q"), "--no-eval"]) == 0
    assert load_params(tmp_path / "q").meta.averaged["steps"] == [9, 12, 13]
    assert cli.main(["export-hf", str(out), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "average (1-sqrt) of the checkpoints at steps 9 (" in card
    lineage = json.loads((tmp_path / "hf" / "lineage.json").read_text())
    assert lineage["events"][-1]["event"] == "averaged"
    argv = ["compare", str(trained), str(out), f"--out={tmp_path / 'c'}", "--limit=2"]
    assert cli.main([*argv, "--tasks", "cldr_facts", "--languages", "ru"]) == 0
    capfd.readouterr()
    # Nothing goes on in it; a run begins from it with new moments.
    stages = (dataclasses.replace(config.stages[1], transition=c.TransitionConfig()),)
    cfg = dataclasses.replace(config, name="second", stages=stages)
    with pytest.raises(UserError, match="parameters alone.*--init-from"):
        train.train(config, out, log=lambda _: None)
    again = tmp_path / "second"
    assert train.train(cfg, again, out, log=lambda _: None) == 0
    meta = Checkpoints(again / "checkpoints", read_only=True).meta(6)
    assert meta.origin["tokens"] == loaded.meta.tokens
    assert meta.origin["lineage"]["events"][-1]["event"] == "averaged"
    assert meta.averaged is None


def test_a_run_from_an_average_has_new_moments(run, config, tmp_path):
    meta = average.average_meta(run, last=2)
    found = average.average_of(run, meta)
    tokenizer = Tokenizer(run / "tokenizer.model")
    model_folder.save_model(found, meta, tokenizer, tmp_path / "out")
    store = Checkpoints(tmp_path / "out" / "checkpoints", read_only=True)
    abstract = abstract_state(config, sharding.make_mesh(c.MeshConfig()))
    state = resume.start_from(config, abstract, store, store.meta(13))
    quantised = dataclasses.replace(store.meta(13), bits=8)
    with pytest.raises(UserError, match="quantised to 8 bits, which no run begins"):
        resume.start_from(config, abstract, store, quantised)
    store.close()
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, found)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--last=1", "an average needs 2 or more"),
        ("--last=7", "for --last 7 up to step 13: 6 of them; .* 3, 6, 7, 9, 12, 13"),
        ("--window=100", r"for --window 100 \(512 tokens a step\) .* 1 of them"),
        ("--last=2 --until=4", "up to step 4: 1 of them.*keep_every_tokens"),
        ("--last=2 --until=1", "up to step 1: 0 of them"),
        ("--ema", r"checkpoints/13 has no average of its parameters: optimizer\.ema_t"),
        ("", "give either --last N, --window TOKENS or --ema"),
        ("--last=2 --window=9", "give either --last N, --window TOKENS or --ema"),
    ],
)
def test_what_is_not_there_is_refused(options, message, run, tmp_path, capfd):
    words = ["average", str(run), str(tmp_path / "out"), *options.split()]
    assert cli.main(words) == 2
    said = capfd.readouterr().err.strip()
    assert "\n" not in said
    assert re.search(message, said), said
    assert list(tmp_path.iterdir()) == []


def test_models_that_have_no_run_are_refused(config, params, tmp_path):
    def of(name, **fields):
        return write_run(tmp_path / name, config, {13: params[13]}, **fields)

    for folder, message in (
        (of("q", bits=8), "is quantised to 8 bits: average the run"),
        (of("i", lineage={"imported": {"folder": "x"}}), "is an imported model"),
        (of("a", averaged={"steps": [1, 2]}), "an average already, of steps 1, 2"),
    ):
        with pytest.raises(UserError, match=message):
            average.average_meta(folder, last=2)
    with pytest.raises(UserError, match="has no checkpoint"):
        average.average_meta(tmp_path, last=2)


def test_a_place_that_is_taken_is_refused(run, tmp_path, capfd):
    (tmp_path / "kept").write_text("x")
    for taken, why in ((tmp_path, "exists already"), (tmp_path / "kept", "a folder")):
        assert cli.main(["average", str(run), str(taken), "--last=2"]) == 2
        assert why in capfd.readouterr().err
    assert (tmp_path / "kept").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_damaged_checkpoint_is_named(run, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    where = copy / "checkpoints" / "9"
    files = (p for p in (where / "params").rglob("*") if p.is_file())
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    for k in range(len(data) // 2, len(data) // 2 + 2000):
        data[k] ^= 0x55
    largest.write_bytes(data)
    meta = average.average_meta(copy, last=3)
    with pytest.raises(DamagedCheckpointError, match="checkpoints/9 cannot be read"):
        average.average_of(copy, meta)
    out = tmp_path / "out"
    assert cli.main(["average", str(copy), str(out), "--last=3"]) == 2
    assert "checkpoints/9 cannot be read" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    average.average_of(copy, average.average_meta(copy, last=2))
