"""The moving average of the parameters: equation, devices, resuming, who reads it."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, started
from flax import linen as nn

from gamayun_jax import cli, train
from gamayun_jax.config import UserError
from gamayun_jax.evaluate import stored_model
from gamayun_jax.interop.load_model import load_params
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.plan import aot, roofline
from gamayun_jax.report import report, scores
from gamayun_jax.training import step as steps
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.ema import new_ema, update_ema


def with_ema(cfg, tokens):
    optimizer = dataclasses.replace(cfg.optimizer, ema_tokens=tokens)
    return dataclasses.replace(cfg, optimizer=optimizer)


def reference(params, each, tau):
    """The average of trees of parameters, oldest first, in float64 and by its weights:
    what each update gave times what the later ones left of it."""
    n = len(params)
    shares = [max(1 - math.exp(-each / tau), 9 / (t + 8)) for t in range(1, n + 1)]
    left = np.cumprod([1.0, *(1 - s for s in reversed(shares[1:]))])[::-1]
    weights = left * shares
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    mean = jax.tree.map(
        lambda *x: sum(w * np.float64(v) for w, v in zip(weights, x, strict=True)),
        *params,
    )
    return mean, weights


def assert_close(tree, expected, atol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=atol),
        tree,
        expected,
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# --- the equation -----------------------------------------------------------------


def test_against_float64(config):
    """Through the growing window (54 updates) and the steady one."""
    rng = np.random.default_rng(0)
    walk = 1 + np.cumsum(rng.normal(size=(120, 7)) / 10, 0).astype(np.float32)
    each = config.tokens_per_step
    cfg = with_ema(config, 6 * each)
    update = jax.jit(lambda ema, p: update_ema(ema, p, cfg))
    ema = new_ema({"w": jnp.zeros(7)})
    for t, p in enumerate(walk, 1):
        ema = update(ema, {"w": p})
        if t == 1:  # nothing of what was before
            np.testing.assert_array_equal(ema["params"]["w"], p)
        if t in (2, 40, 120):
            expected, _ = reference([{"w": x} for x in walk[:t]], each, 6 * each)
            assert_close(ema["params"], expected)
    assert int(ema["updates"]) == 120


def test_what_the_weights_are():
    """The first half has 2**-9; in the end they fall by e in so many tokens."""
    young = reference([{"w": 0.0}] * 1000, 1, 10**6)[1]
    assert young[:500].sum() == pytest.approx(2**-9, rel=0.05)
    rising = np.float64([math.prod(range(k, k + 8)) for k in range(1, 1001)])
    np.testing.assert_allclose(young, rising / rising.sum(), rtol=1e-9)
    old = reference([{"w": 0.0}] * 1000, 2, 100)[1]
    assert old[-1] / old[-51] == pytest.approx(math.e)


@pytest.mark.parametrize("rows", [4, 16])
def test_the_same_in_tokens_at_any_batch_size(rows, config, replace):
    """So many tokens of other parameters leave the same of what was before."""
    tokens = 2000 * 8 * 64
    cfg = with_ema(replace(config, "data.batch_size", rows), tokens)
    ema = {"params": {"w": jnp.ones(1)}, "updates": jnp.int32(10**6)}
    count = tokens // cfg.tokens_per_step
    zero = {"w": jnp.zeros(1)}
    ema = jax.lax.fori_loop(0, count, lambda _, e: update_ema(e, zero, cfg), ema)
    assert float(ema["params"]["w"][0]) == pytest.approx(1 / math.e, rel=1e-4)


# --- in the step ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "microbatches", "dtype"),
    [
        ((2, 2, 2), 2, "bfloat16"),
        pytest.param((1, 1, 1), 1, "float32", marks=pytest.mark.slow),
    ],
)
def test_in_the_step(sizes, microbatches, dtype, wide_config, new_states, random_batch):
    """Of the parameters that the step gives, on any mesh; a skipped step leaves it."""
    compute = dataclasses.replace(
        wide_config.compute, microbatches=microbatches, dtype=dtype
    )
    tau = 3 * wide_config.tokens_per_step
    cfg = with_ema(dataclasses.replace(wide_config, compute=compute), tau)
    mesh = mesh_of(sizes)
    tables = TokenWeights(np.ones(3, np.float32), np.ones(cfg.model.vocab_size, "f4"))
    data = random_batch(cfg.data.batch_size, cfg.data.seq_len, cfg.model.vocab_size)
    bad = {**data, "loss_mask": data["loss_mask"] * np.float32(np.nan)}
    layout = sharding.batch_sharding(mesh)
    (first,) = (s for s in new_states if s.params["embedding"].sharding.mesh == mesh)
    params, counts, averages = [], [], []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        abstract = steps.abstract_state(cfg, mesh)
        state = steps.begin_ema(jax.tree.map(jnp.copy, first), abstract)
        run = steps.compile_step(cfg, mesh, abstract, 0, tables, 0)
        for batch in (data, data, bad, data):
            state, _ = run(state, jax.device_put(batch, layout))
            host = jax.device_get(state)
            params.append(host.params)
            averages.append(host.ema["params"])
            counts.append(int(host.ema["updates"]))
    assert counts == [1, 2, 2, 3]
    assert_same(averages[0], params[0])
    assert_same(averages[1], averages[2])
    del params[2]
    expected, _ = reference(params, cfg.tokens_per_step, tau)
    assert_close(averages[-1], expected, atol=1e-8)
    assert np.any(averages[-1]["embedding"] != params[-1]["embedding"])
    used = aot.memory(abstract, run)
    assert used["average"] == used["parameters"] + 4  # and the number of updates
    whole = sum(used[k] for k in ("parameters", "optimiser", "average"))
    assert run.memory_analysis().alias_size_in_bytes >= whole  # all are donated
    for tree in (state.ema["params"], abstract.ema["params"]):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype("float32")}
        jax.tree.map(lambda a, p: a.sharding == p.sharding or 1 / 0, tree, state.params)


def test_the_same_bits_on_any_devices(wide_config, new_states):
    cfg = with_ema(wide_config, 5 * wide_config.tokens_per_step)

    @jax.jit
    def average(params):
        ema = new_ema(params)
        for factor in (1.0, 8.0, -0.5):
            scaled = jax.tree.map(lambda x, k=factor: k * x, params)
            ema = update_ema(ema, scaled, cfg)
        return ema

    assert_same(*(average(state.params) for state in new_states))


# --- a run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(config, tmp_path_factory):
    """A config with an average, and a run of it with a checkpoint of each step."""
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=1)
    log = dataclasses.replace(config.log, tensorboard=True)
    cfg = with_ema(config, 3 * config.tokens_per_step)
    cfg = dataclasses.replace(cfg, checkpoint=checkpoint, log=log)
    run = tmp_path_factory.mktemp("runs") / "kept"
    assert train.train(cfg, run, log=lambda _: None) == 0
    return cfg, run


def state_of(run, cfg, step):
    store = Checkpoints(run / "checkpoints", read_only=True)
    abstract = steps.abstract_state(cfg, sharding.make_mesh(cfg.mesh))
    state = jax.device_get(store.restore(step, abstract))
    store.close()
    return state


def cut_after(run, step, to):
    """A copy of a run as it was when its checkpoint `step` was the newest."""

    def newer(folder, names):
        inside = folder.endswith("checkpoints")
        return [n for n in names if inside and n.isdigit() and int(n) > step]

    return shutil.copytree(run, to, ignore=newer)


def evaluations(run):
    files = sorted(p for p in (run / "eval").rglob("*") if p.is_file())
    return {str(p.relative_to(run)): p.read_text() for p in files}


def ema_events(run):
    events = json.loads((run / "lineage.json").read_text())["events"]
    return [(e["step"], e[k]) for e in events for k in e if k.startswith("average")]


def test_a_run_s_average_is_that_of_its_checkpoints(kept):
    cfg, run = kept
    params = [state_of(run, cfg, t).params for t in range(1, 14)]
    expected, _ = reference(params, cfg.tokens_per_step, cfg.optimizer.ema_tokens)
    ema = state_of(run, cfg, 13).ema
    assert_close(ema["params"], expected)
    # The second stage resets the moments, and not this.
    assert int(ema["updates"]) == 13
    assert ema_events(run) == []


@pytest.mark.slow
def test_resumed_is_the_same_bit_for_bit(kept, tmp_path):
    cfg, run = kept
    again = cut_after(run, 5, tmp_path / "run")
    assert train.train(cfg, again, log=lambda _: None) == 0
    assert_same(state_of(again, cfg, 13), state_of(run, cfg, 13))
    assert evaluations(again) == evaluations(run)
    assert ema_events(again) == []


def test_it_may_be_switched_off_and_on_again(kept, config, tmp_path):
    """Without it the run is the same as one that never had it."""
    cfg, run = kept
    off, again, said = with_ema(cfg, 0), cut_after(run, 11, tmp_path / "run"), []
    assert train.train(off, again, log=said.append) == 0
    assert any("ema_tokens) is dropped at step 11" in text for text in said)
    assert ema_events(again) == [(11, "is dropped")]
    assert not (again / "checkpoints" / "13" / "ema").exists()
    state = state_of(again, off, 13)
    assert state.ema is None
    assert_same(state.params, state_of(run, cfg, 13).params)
    shutil.rmtree(again / "checkpoints" / "13")
    assert train.train(cfg, again, log=said.append) == 0
    assert any("ema_tokens) begins at step 12" in text for text in said)
    assert ema_events(again) == [(11, "is dropped"), (12, "begins")]
    state = state_of(again, cfg, 13)
    assert int(state.ema["updates"]) == 1
    assert_same(state.ema["params"], state.params)


def test_a_run_from_another_begins_with_the_parameters(kept, tmp_path):
    """Their average goes on, begins or is dropped, and is said to."""
    cfg, run = kept
    out = tmp_path / "average"
    assert cli.main(["average", str(run), str(out), "--ema", "--until=7"]) == 0
    former = state_of(run, cfg, 7)
    for tokens, origin, updates, change in (
        (9999, run / "checkpoints" / "7", 7, "goes on"),
        (0, run / "checkpoints" / "7", None, "is dropped"),
        (9999, out, 0, "begins"),
        (0, out, None, ""),
    ):
        second = dataclasses.replace(cfg, name="second", stages=cfg.stages[1:])
        new = tmp_path / f"{tokens} {origin.name}"
        begun = started(with_ema(second, tokens), new, origin)
        assert ema_events(new) == [(0, change)] * bool(change)
        assert any(f"ema_tokens) {change} at" in text for text in begun.log) == bool(
            change
        )
        told = any("begins with the parameters themselves" in t for t in begun.log)
        assert told == (origin != out)
        assert (begun.state.ema and int(begun.state.ema["updates"])) == updates
        raw = former.ema["params"] if origin == out else former.params
        assert_same(begun.state.params, raw)
        if updates:
            assert_same(begun.state.ema, former.ema)


# --- who reads it -----------------------------------------------------------------


def test_both_are_evaluated(kept):
    _, run = kept
    first, last = (json.loads((run / f"eval/{k}.json").read_text()) for k in (0, 13))
    assert "ema" not in first  # there is none before the first update
    raw, ema = last["sets"]["udhr"], last["ema"]["sets"]["udhr"]
    assert ema.keys() == raw.keys()
    assert ema["macro"]["bits_per_byte"] != raw["macro"]["bits_per_byte"]
    tags = b"".join(p.read_bytes() for p in run.glob("events.*"))
    assert b"eval/udhr/bits_per_byte/ru" in tags
    assert b"eval/udhr/bits_per_byte/macro" in tags
    assert b"train/nll/macro" in tags
    assert b"ema/eval/udhr/bits_per_byte/ru" in tags
    text = scores.run_text(run)
    assert " average " in text
    value = ema["languages"]["ru"]["bits_per_byte"]
    change = value - raw["languages"]["ru"]["bits_per_byte"]
    sign = "+" if change > 0 else "−"
    assert f"{value:.3f} {sign}{abs(change):.3f}" in text
    page = report.write_report([run], run.parent / "page").read_text("utf-8")
    assert "“average”" in page


def test_as_a_model_of_its_own(kept, tmp_path, capfd):
    """What is evaluated and exported is what the run kept and evaluated."""
    cfg, run = kept
    out = tmp_path / "out"
    assert cli.main(["average", str(run), str(out), "--ema", "--until", "10"]) == 0
    assert "moving average of the run at step 10" in capfd.readouterr().out
    loaded = load_params(out)
    assert_same(loaded.params, state_of(run, cfg, 10).ema["params"])
    averaged = {"scheme": "ema", "ema_tokens": cfg.optimizer.ema_tokens}
    assert loaded.meta.averaged == averaged
    assert loaded.meta.lineage["events"][-1]["event"] == "averaged"
    newest = tmp_path / "newest"
    assert cli.main(["average", str(run), str(newest), "--ema"]) == 0
    found = stored_model.evaluate_heldout(newest)[0]["sets"]["udhr"]["macro"]
    recorded = json.loads((run / "eval/13.json").read_text())["ema"]["sets"]["udhr"]
    assert found["bits_per_byte"] == pytest.approx(
        recorded["macro"]["bits_per_byte"], rel=1e-6
    )
    assert cli.main(["export-hf", str(newest), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "exponential moving average" in card
    for folder, options, message in (
        (newest, [], "is an average already"),
        (run, ["--last=2"], "give either --last N, --window TOKENS or --ema"),
        (run, ["--weights=linear"], "--weights linear is of checkpoints"),
    ):
        words = ["average", str(folder), str(tmp_path / "no"), "--ema", *options]
        assert cli.main(words) == 2
        assert message in capfd.readouterr().err


def test_fewer_tokens_than_a_step_are_named(config):
    with pytest.raises(UserError, match=r"ema_tokens=511 .* 512 tokens of one step"):
        with_ema(config, 511)
    with pytest.raises(UserError, match=r"optimizer\.ema_tokens"):
        with_ema(config, -1)


def test_a_plan_has_room_for_it(wide_config):
    """4 bytes a parameter, and their way to memory and back."""
    cfg, mesh = with_ema(wide_config, 10**6), {"data": 1, "fsdp": 2, "tensor": 1}
    size = roofline.parameter_bytes(cfg, mesh)
    for estimate, times in ((roofline.memory_estimate, 1), (roofline.hbm_bytes, 2)):
        more = estimate(cfg, mesh) - estimate(wide_config, mesh)
        assert more == pytest.approx(times * size)
