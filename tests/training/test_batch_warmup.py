"""Batches that grow: several updates in a step, whose examples stay what they were."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_batch
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from gamayun_jax import api, train
from gamayun_jax.config import MeshConfig, ScheduleConfig, UserError
from gamayun_jax.model import sharding
from gamayun_jax.model.loss import TokenWeights
from gamayun_jax.study import side_by_side
from gamayun_jax.training import step
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.lineage import rate_points
from gamayun_jax.training.optimizer import learning_rate


def warmed(cfg, first, tokens, **fields):
    optimizer = dataclasses.replace(
        cfg.optimizer, first_batch_size=first, batch_warmup_tokens=tokens, **fields
    )
    return dataclasses.replace(cfg, optimizer=optimizer)


@given(st.integers(0, 5), st.integers(1, 10**12), st.lists(st.integers(0, 2 * 10**12)))
def test_sizes_double_on_a_line(wide_config, doublings, length, at):
    whole = 3 * 2**5
    data = dataclasses.replace(wide_config.data, batch_size=whole)
    first = whole >> doublings
    cfg = warmed(dataclasses.replace(wide_config, data=data), first, length)
    sizes = [whole // cfg.updates_at(t) for t in sorted(at)]
    assert sizes == sorted(sizes)
    for t, size in zip(sorted(at), sizes, strict=True):
        line = first + min(1, t / length) * (whole - first)
        assert size <= line * (1 + 1e-12)
        assert size == whole or 2 * size > line * (1 - 1e-12)
    assert whole // cfg.updates_at(0) == first
    assert cfg.updates_at(length) == 1
    assert wide_config.updates_at(0) == 1


@pytest.mark.parametrize(
    ("first", "tokens", "message"),
    [
        (8, 0, "first_batch_size=8 and optimizer.batch_warmup_tokens=0: give both"),
        (0, 9, "give both, or neither"),
        (5, 9, "first_batch_size=5 is not data.batch_size=24 over a power of two"),
        (8, 9, "first_batch_size=8 is not data.batch_size=24 over a power of two"),
    ],
)
def test_what_is_no_warm_up(wide_config, first, tokens, message):
    with pytest.raises(UserError, match=message):
        warmed(wide_config, first, tokens)


def test_batches_that_do_not_divide_over_the_devices(wide_config, replace):
    mesh = mesh_of((2, 2, 2))
    sharding.check_divisible(warmed(wide_config, 12, 9), mesh)
    with pytest.raises(UserError, match="updates of 6 examples in 1 microbatches do"):
        sharding.check_divisible(warmed(wide_config, 6, 9), mesh)
    many = replace(wide_config, "compute.microbatches", 6)
    assert [many.microbatches_of(n) for n in (1, 2, 4, 8)] == [6, 3, 2, 1]


@pytest.mark.parametrize(
    "kind", ["adamw", pytest.param("muon", marks=pytest.mark.slow)]
)
def test_a_step_is_so_many_updates(wide_config, kind):
    """On one device and on eight, with the rows of each taken out by hand."""
    cfg = warmed(wide_config, 6, 10**6, ema_tokens=10**5, kind=kind)
    schedule = ScheduleConfig(peak=3e-3, warmup_tokens=10**4)
    stage = dataclasses.replace(cfg.stages[0], tokens=10**6, schedule=schedule)
    cfg = dataclasses.replace(cfg, stages=(stage,))
    V = cfg.model.vocab_size
    batch = random_batch(cfg.data.batch_size, cfg.data.seq_len, V)
    tables = TokenWeights(np.float32([0.5, 1, 2]), np.ones(V, np.float32))

    def on(sizes, microbatches=1):
        compute = dataclasses.replace(cfg.compute, microbatches=microbatches)
        here = dataclasses.replace(cfg, compute=compute)
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            abstract = step.abstract_state(here, mesh)
            run = step.compile_step(here, mesh, abstract, 0, tables, 999, 4)
            state = step.new_state(here, mesh)
            rows = jax.device_put(batch, sharding.batch_sharding(mesh))
            return jax.device_get(run(state, rows))

    state, sums = jax.device_get(step.new_state(cfg, mesh_of((1, 1, 1)))), []
    update = jax.jit(lambda s, b, r: step.update(s, b, cfg, tables, r, 4))
    for i in range(4):
        tokens = 999 + (i + 0.5) / 4 * cfg.tokens_per_step
        rate = float(learning_rate(schedule, tokens, 0, 10**6)) / 2
        state, metrics = update(state, {k: v[i::4] for k, v in batch.items()}, rate)
        sums.append(jax.device_get(metrics))
    for sizes, microbatches in (((1, 1, 1), 1), ((1, 1, 1), 2), ((1, 2, 4), 1)):
        got, metrics = on(sizes, microbatches)
        assert int(got.step) == 1
        assert int(got.ema["updates"]) == 4
        for a, b in zip(
            jax.tree.leaves((got.params, got.ema)),
            jax.tree.leaves((state.params, state.ema)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=2e-5 if kind == "muon" else 3e-6)
        for name in ("loss_sum", "target_count", "squared_weights"):
            total = sum(s[name] for s in sums)
            np.testing.assert_allclose(metrics[name], total, rtol=1e-4)
        mean = np.mean([s["grad_norm"] for s in sums])
        np.testing.assert_allclose(metrics["grad_norm"], mean, rtol=1e-3)
        assert metrics["learning_rate"] == pytest.approx(rate)
        assert metrics["skipped"] == 0


def test_an_update_that_is_not_finite_is_skipped_alone(wide_config):
    cfg = warmed(wide_config, 12, 10**6)
    V = cfg.model.vocab_size
    batch = random_batch(cfg.data.batch_size, cfg.data.seq_len, V)
    batch["loss_mask"][1] = np.inf  # a row of the second of two updates
    tables = TokenWeights(np.ones(3, np.float32), np.ones(V, np.float32))
    state = jax.device_get(step.new_state(cfg, mesh_of((1, 1, 1))))
    got, metrics = jax.jit(
        lambda s, b: step.train_step(s, b, cfg, 0, tables, 0, updates=2)
    )(state, batch)
    one = {k: v[::2] for k, v in batch.items()}
    rate = metrics["learning_rate"]
    assert metrics["skipped"] == 1
    assert metrics["grad_norm"] == 0
    assert np.isfinite(metrics["loss_sum"])
    assert int(got.opt_state[1].count) == 1
    assert metrics["target_count"] == pytest.approx(one["loss_mask"].sum())
    assert rate > 0


# --- a run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Two doublings in the first stage, over four devices by rows."""
    cfg = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=16),
        stages=tuple(
            dataclasses.replace(s, tokens=2 * s.tokens) for s in config.stages
        ),
        mesh=MeshConfig(1, 4, 2),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=1),
    )
    cfg = warmed(cfg, 4, 6 * cfg.tokens_per_step)
    said, run = [], tmp_path_factory.mktemp("runs") / "warm"
    assert train.train(cfg, run, log=said.append) == 0
    return cfg, run, said


@pytest.mark.slow
def test_a_warm_up_beyond_the_run_is_said(whole, tmp_path):
    class Told(Exception):  # noqa: N818
        pass

    def log(text):
        if "never have all 16 examples of a step" in text:
            raise Told

    with pytest.raises(Told):
        train.train(warmed(whole[0], 4, 10**9), tmp_path / "run", log=log)
    assert not any("never have all" in text for text in whole[2])


def state_of(run, cfg):
    store = Checkpoints(run / "checkpoints", read_only=True)
    state = store.restore(13, step.abstract_state(cfg, mesh_of((1, 4, 2))))
    store.close()
    return jax.device_get(state)


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines]
    return [{k: v for k, v in r.items() if k != "time"} for r in rows]


@pytest.mark.slow
def test_sizes_are_said_and_recorded(whole):
    cfg, run, said = whole
    told = [x for x in said if x.startswith("from step")]
    starts = [t.split()[2] for t in told]
    sizes = [int(t.split()[-2]) for t in told]
    assert sizes == [4, 8, 16, 16]  # the last one where the second stage begins
    assert starts == ["1", "3", "7", "8"]
    trained = [r for r in records(run) if r["kind"] == "train"]
    assert [r["batch_size"] for r in trained][:2] == [8, 16]
    # What was served is what a run without a warm-up is served.
    assert all(
        r["tokens"] == r["step"] * cfg.tokens_per_step
        and sum(s["tokens"] for s in r["sources"].values()) == r["tokens"]
        for r in trained
    )


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 3, 6])
def test_resumed_is_the_same_bit_for_bit(whole, last, tmp_path):
    cfg, straight, _ = whole
    again = tmp_path / "again"

    def newer(folder, names):
        inside = folder == str(straight / "checkpoints")
        return [n for n in names if inside and n.isdigit() and int(n) > last]

    shutil.copytree(straight, again, ignore=newer)
    assert train.train(cfg, again, log=lambda _: None) == 0
    jax.tree.map(
        np.testing.assert_array_equal, state_of(straight, cfg), state_of(again, cfg)
    )
    assert records(straight) == records(again)


def test_rates_planned_and_recorded_are_an_update_s(whole):
    cfg, run, _ = whole
    first, end = cfg.stages[0], cfg.stage_start(1) * cfg.tokens_per_step
    trained = [r for r in records(run) if r["kind"] == "train" and r["tokens"] <= end]
    made = [
        # In the midst of the last update of the step.
        (r["tokens"] - r["batch_size"] * cfg.data.seq_len / 2, r["lr"], r["batch_size"])
        for r in trained
    ]
    planned = [
        (at, rate, cfg.data.batch_size // cfg.updates_at(at))
        for at, rate in rate_points(cfg)
        if at < end
    ]
    assert {size for *_, size in made} > {16}
    assert {size for *_, size in planned} == {4, 8, 16}
    for at, rate, size in made + planned:
        whole_batch = float(learning_rate(first.schedule, at, 0, end))
        assert rate == pytest.approx(whole_batch * (size / 16) ** 0.5, rel=1e-2)


def test_tokens_before_the_run_count(whole):
    """A second run, of --init-from, does not warm up again."""
    cfg, _, _ = whole
    assert cfg.updates_at(cfg.total_steps * cfg.tokens_per_step) == 1


def test_shorter_and_longer_configs_warm_up_in_proportion(config):
    long = warmed(config, 2, 6 * config.tokens_per_step)
    assert api.configs.lengthen(long, 4).optimizer.batch_warmup_tokens == 24 * (
        config.tokens_per_step
    )
    assert api.configs.shorten(long, 6).optimizer.batch_warmup_tokens == 3 * (
        config.tokens_per_step
    )


def test_runs_side_by_side_do_without(config):
    member = side_by_side.Member(warmed(config, 2, 9999), plan=None)
    with pytest.raises(UserError, match="first_batch_size is not done side by side"):
        side_by_side.check_members([member])
