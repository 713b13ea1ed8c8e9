"""Runs on spot VMs: the simulation against formulas, limits and its own arithmetic."""

import dataclasses
import json

import numpy as np
import pytest

from gamayun_jax.config import UserError
from gamayun_jax.plan import preemption
from gamayun_jax.plan import text as plan_text
from gamayun_jax.plan.preemption import DAY, Preemptions

PLAN = {
    "seconds": {"step": 0.5}, "days": 5.0, "chips": 16, "chip_hours": 5 * 24 * 16,
    "cost": 5 * 24 * 16 * 1.5, "currency": "EUR",
}  # fmt: skip


@pytest.mark.parametrize("per_day", [0.5, 4, 40])
def test_the_mean_is_daly_s(per_day):
    """Without a queue, and but for the first start, which his formula leaves out."""
    p = Preemptions(per_day, restart=300, save=20)
    work, intervals = 3 * DAY, [600.0, 1800.0]
    found = preemption.simulate(work, intervals, p, runs=4000)
    for tau, uptime in zip(intervals, found["uptime"], strict=True):
        error = uptime.std() / np.sqrt(len(uptime))
        # A start takes a little more than its time, being interrupted itself.
        first = DAY / per_day * np.expm1(300 * per_day / DAY)
        expected = preemption.expected_uptime(work, tau, p) + first
        assert abs(uptime.mean() - expected) < 4 * error + 1e-4 * expected


def test_without_preemptions_nothing_is_lost():
    p = Preemptions(1e-9, restart=60, save=10, queue=0)
    found = preemption.simulate(1000, [100.0, 300.0], p, runs=3)
    assert found["uptime"].tolist() == [[60 + 1000 + 100] * 3, [60 + 1000 + 40] * 3]
    assert not found["preemptions"].any()


def test_one_run_by_hand():
    """Seeded, so the same preemptions fall on it; a loop over them by hand."""
    p, work, tau = Preemptions(50, restart=120, save=15, queue=30), 20_000.0, 700.0
    found = preemption.simulate(work, [tau], p, runs=1, seed=3)
    rng, left, clock, count = np.random.default_rng(3), work, 0.0, 0
    while True:
        until, wait = rng.exponential(DAY / 50, 1)[0], rng.exponential(30, 1)[0]
        clock += wait
        at, saved = 120.0, left
        while saved > 0 and at + min(tau, saved) + 15 <= until:
            at, saved = at + min(tau, saved) + 15, saved - min(tau, saved)
        left = saved
        if left <= 0:
            clock += at
            break
        clock, count = clock + until, count + 1
    assert found["wall"][0, 0] == pytest.approx(clock)
    assert found["preemptions"][0, 0] == count > 3


@pytest.mark.parametrize("per_day", [1, 6, 48])
def test_the_best_interval_is_daly_s_and_cheapest(per_day):
    p = Preemptions(per_day, restart=300, save=20)
    told = preemption.on_spot(PLAN, p, own=100)
    assert told["interval"] == pytest.approx(told["daly"], rel=0.5)
    assert told["daly"] == pytest.approx(told["young"], rel=0.2)
    assert told["every_steps"] * 0.5 == told["interval"]
    # The optimum is flat: what counts is that nothing is lost by the choice.
    best = preemption.expected_uptime(5 * DAY, told["daly"], p)
    chosen = preemption.expected_uptime(5 * DAY, told["interval"], p)
    assert chosen < 1.005 * best
    assert told["own_days"] > told["days"] > 5.0
    least, most = told["days_10_90"]
    assert least < told["days"] < most
    assert told["cost"] == pytest.approx(told["chip_hours"] * 1.5)


def test_waiting_for_vms_takes_days_and_costs_nothing():
    at_once = preemption.on_spot(PLAN, Preemptions(4), 1000)
    queued = preemption.on_spot(PLAN, Preemptions(4, queue=7200), 1000)
    more = (queued["preemptions"] + 1) * 7200 / DAY
    assert queued["days"] - at_once["days"] == pytest.approx(more, rel=0.1)
    assert queued["cost"] == pytest.approx(at_once["cost"], rel=0.02)
    text = "\n".join(plan_text.spot_lines(queued, PLAN))
    assert "EUR" in text
    assert f"checkpoint.every_steps={queued['every_steps']}" in text


@pytest.mark.slow
def test_a_hopeless_rate_is_refused_in_one_line():
    with pytest.raises(UserError, match="leave hardly any time") as e:
        preemption.on_spot(PLAN, Preemptions(2000, restart=600), 1000)
    assert "\n" not in str(e.value)
    told = preemption.on_spot(PLAN, Preemptions(300, restart=60), own=100_000)
    assert told["own_days"] is None
    assert "hardly ever done" in "\n".join(plan_text.spot_lines(told, PLAN))


def test_times_of_a_former_run(tmp_path):
    spent = {"start": 30.0, "compile": 90.0, "checkpoint": 12.0}
    (tmp_path / "goodput.json").write_text(json.dumps(spent))
    lineage = {
        "events": [{"event": "resumed"}, {"event": "gone"}],
        "checkpoints": [1] * 4,
    }
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    assert preemption.measured_times(tmp_path) == (60.0, 3.0)
    with pytest.raises(UserError, match="name a run folder"):
        preemption.measured_times(tmp_path / "none")


def test_the_same_seed_gives_the_same_plan():
    p = Preemptions(4)
    assert preemption.on_spot(PLAN, p, 1000) == preemption.on_spot(PLAN, p, 1000)
    assert dataclasses.asdict(p)["restart"] == 600.0
