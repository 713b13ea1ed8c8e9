"""A run of shuffled stages: resumed, rolled back, gone on from, read back."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gamayun_jax import train
from gamayun_jax.config import MixtureConfig, UserError
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.evaluate import forgetting
from gamayun_jax.model import sharding
from gamayun_jax.training import checkpoint
from gamayun_jax.training.step import abstract_state


def quiet(text):
    pass


def state_of(run, cfg):
    """The last saved state as host arrays."""
    store = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    with contextlib.closing(store):
        state = store.restore(13, abstract_state(cfg, sharding.make_mesh(cfg.mesh)))
        return jax.tree.leaves(jax.device_get(state))


def records(run):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def copy_at(run, step, to):
    """A copy of a run as it was when its checkpoint `step` was the newest."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return to


@pytest.fixture(scope="module")
def straight(shuffled, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert train.train(shuffled, run, log=quiet) == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])
def test_killed_inside_a_stage_it_ends_the_same(step, straight, shuffled, tmp_path):
    run = copy_at(straight, step, tmp_path / "run")
    assert train.train(shuffled, run, log=quiet) == 0
    for a, b in zip(state_of(straight, shuffled), state_of(run, shuffled), strict=True):
        np.testing.assert_array_equal(a, b)
    assert records(run) == records(straight)


def test_records_have_counted_what_the_plan_served(straight, shuffled, corpus):
    """On the device, by language; and by the plan, at every step, by its examples."""
    plan = make_data_plan(shuffled, corpus)
    dataset, _ = plan.lookup(np.arange(13 * 8))
    for step in range(14):
        counted = np.bincount(dataset[: step * 8], minlength=3).tolist()
        assert list(plan.served(step).values()) == counted
        assert plan.consumed(step) == plan.served(step)
    before = 0
    for record in records(straight):
        served, former = plan.served(record["step"]), plan.served(before)
        for language, row in record["languages"].items():
            name = f"{language}/help"
            assert row["tokens"] == (served[name] - former[name]) * 64
            assert record["sources"][name]["tokens"] == served[name] * 64
        before = record["step"]


def test_the_same_examples_in_another_order(shuffled, config, corpus):
    cfg = dataclasses.replace(
        shuffled,
        stages=tuple(
            dataclasses.replace(
                s, mixture=dataclasses.replace(s.mixture, order="interleaved")
            )
            for s in shuffled.stages
        ),
    )
    rows = [
        [tuple(row) for s in range(13) for row in batches[s]["inputs"].tolist()]
        for batches in (
            LocalBatches(k, corpus, make_data_plan(k, corpus), np.arange(8))
            for k in (shuffled, cfg)
        )
    ]
    assert sorted(rows[0]) == sorted(rows[1])
    assert rows[0] != rows[1]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_rows_of_one_batch(shuffled, corpus, hosts):
    plan = make_data_plan(shuffled, corpus)
    whole = LocalBatches(shuffled, corpus, plan, np.arange(8))
    parts = [
        LocalBatches(shuffled, corpus, make_data_plan(shuffled, corpus), rows)
        for rows in np.split(np.arange(8), hosts)
    ]
    for step in (0, 5, 12):
        joined = np.concatenate([p[step]["inputs"] for p in parts])
        np.testing.assert_array_equal(joined, whole[step]["inputs"])


def test_a_begun_stage_is_not_prolonged_but_another_may_follow(
    straight, shuffled, tmp_path
):
    run = copy_at(straight, 9, tmp_path / "run")
    first, second = shuffled.stages
    longer = dataclasses.replace(second, tokens=second.tokens + 8 * 64)
    for changed, told in (
        (longer, "stages.enrich.tokens was 3072 and is 3584"),
        (
            dataclasses.replace(second, mixture=MixtureConfig("natural")),
            "stages.enrich.mixture.order was 'shuffled' and is 'interleaved'",
        ),
    ):
        cfg = dataclasses.replace(shuffled, stages=(first, changed))
        with pytest.raises(UserError, match=told):
            train.train(cfg, run, log=quiet)
    schedule = dataclasses.replace(second.schedule, decay_tokens=0)
    third = dataclasses.replace(second, name="third", tokens=8 * 64, schedule=schedule)
    cfg = dataclasses.replace(shuffled, stages=(first, second, third))
    assert train.train(cfg, run, log=quiet) == 0
    assert records(run)[-1]["step"] == 14


def pairs(plan, first, last):
    """(dataset, position) of all examples of steps `first` to `last`, from 1."""
    examples = np.arange((first - 1) * 8, last * 8)
    return {*zip(*(x.tolist() for x in plan.lookup(examples)), strict=True)}


def test_no_example_comes_again_in_a_run_that_goes_on(shuffled, corpus):
    """Not even from inside of a shuffled stage."""
    plan = make_data_plan(shuffled, corpus)
    origin = {
        "cursors": plan.consumed(4),
        "seed": plan.runs[-1].curriculum.seed,
        "shares": plan.shares[0],
    }
    going_on = make_data_plan(shuffled, corpus, origin)
    assert not pairs(plan, 1, 4) & pairs(going_on, 1, 13)


def test_probes_know_the_step_that_served_them(shuffled, corpus):
    """And what was never served is none of the run's."""
    plan = make_data_plan(shuffled, corpus)
    order = LocalBatches(shuffled, corpus, plan, np.arange(8)).order
    for source in plan.sources:
        for p in forgetting.served_probes(plan, order, source, 13, 8):
            assert (p.dataset, p.position) in pairs(plan, p.step, p.step)
        unseen = forgetting.unseen_probes(plan, source, 13, 8)
        assert not {(p.dataset, p.position) for p in unseen} & pairs(plan, 1, 13)
