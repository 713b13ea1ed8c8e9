"""Poison in the data: the update is left out, the run goes back, the data stay exact.

The poison is a row of the corpus: where the loss meets it, it is not finite, or far
too high. So leaving the row out helps, and nothing else does.
"""

import dataclasses
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shuffle_stages

from gamayun_jax import train
from gamayun_jax.config import DivergenceConfig, UserError
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.training import checkpoint, divergence, resume, step
from gamayun_jax.training.divergence import DivergenceDetector, spike_limit


def quiet(text):
    pass


def records(run):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def final(run, at=13):
    store = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    meta = store.meta(at)
    store.close()
    return meta


@pytest.fixture(params=["even", pytest.param("shuffled", marks=pytest.mark.slow)])
def small(config, request):
    return shuffle_stages(config) if request.param == "shuffled" else config


@pytest.fixture
def poison(small, corpus, monkeypatch):
    """poison([(step, row), ...], value): their loss becomes `value`."""
    plan = make_data_plan(small, corpus)
    rows = np.arange(small.data.batch_size)
    batches = LocalBatches(small, corpus, plan, rows)

    def inject(places, value):
        bad = np.stack([batches[s - 1]["inputs"][r] for s, r in places])
        weighted_loss = step.weighted_loss

        def loss(x, head, batch, *rest):
            # By rows: no collective that the step has not.
            same = (batch["inputs"][:, None, :] == jnp.asarray(bad)[None]).all(-1)
            factor_B = jnp.where(same.any(-1), value, 1.0).astype(x.dtype)
            return weighted_loss(x * factor_B[:, None, None], head, batch, *rest)

        monkeypatch.setattr(step, "weighted_loss", loss)
        return bad

    return inject


def served(cfg, corpus, rollbacks):
    """Every row that a run serves, in order."""
    plan = make_data_plan(cfg, corpus, None, rollbacks)
    batches = LocalBatches(cfg, corpus, plan, np.arange(cfg.data.batch_size))
    return np.concatenate([batches[s]["inputs"] for s in range(cfg.total_steps)])


def test_one_bad_step_is_left_out_and_counted(small, poison, tmp_path):
    poison([(5, 3)], np.nan)
    run = tmp_path / "run"
    assert train.train(small, run, log=quiet) == 0
    assert [r["skipped"] for r in records(run)] == [0, 1, 0, 0]
    assert all(np.isfinite(r["loss"]) for r in records(run))
    assert not (run / "rollbacks.json").exists()
    store = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    assert store.meta(13).step == 13
    store.close()


@pytest.mark.slow
def test_a_skipped_update_changes_nothing_but_the_step(small, poison, tmp_path):
    """The state after a bad last step is the state before it."""
    cfg = dataclasses.replace(
        small, checkpoint=dataclasses.replace(small.checkpoint, every_steps=1)
    )
    poison([(5, 3)], np.inf)
    assert train.train(cfg, tmp_path / "run", log=quiet) == 0
    store = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    before, after, next_one = (store.meta(s).checksums for s in (4, 5, 6))
    store.close()
    assert before["params"] == after["params"] != next_one["params"]
    del before["opt_state"]["step"], after["opt_state"]["step"]
    assert before["opt_state"] == after["opt_state"]


@pytest.fixture
def strict(small):
    """Back at the second bad step in a row."""
    return dataclasses.replace(small, divergence=DivergenceConfig(nonfinite=2))


def test_bad_steps_in_a_row_roll_back_and_are_left_out(
    strict, corpus, poison, tmp_path
):
    bad = poison([(5, 3), (6, 0)], np.nan)
    run, said = tmp_path / "run", []
    assert train.train(strict, run, log=said.append) == 0
    assert any("not finite at step 5 to 6: going back to step 3" in x for x in said)
    (decision,) = json.loads((run / "rollbacks.json").read_text())["rollbacks"]
    assert (decision["to"], decision["step"]) == (3, 6)
    assert sum(s["end"] - s["begin"] for s in decision["skipped"]) == 16
    # The examples of steps 5 and 6 never came; those before did not move; no source
    # lost a place to another; nothing is served twice.
    old, new = served(strict, corpus, []), served(strict, corpus, [decision])
    np.testing.assert_array_equal(old[:32], new[:32])
    assert not (new[:, None] == bad[None]).all(-1).any()
    plan = make_data_plan(strict, corpus, None, [decision])
    dataset, position = plan.lookup(np.arange(13 * 8))
    former, before = make_data_plan(strict, corpus).lookup(np.arange(13 * 8))
    np.testing.assert_array_equal(dataset, former)
    assert len({*zip(dataset.tolist(), position.tolist(), strict=True)}) == 13 * 8
    left_out = {*zip(former[32:48].tolist(), before[32:48].tolist(), strict=True)}
    assert not left_out & {*zip(dataset.tolist(), position.tolist(), strict=True)}
    meta = final(run)
    assert meta.lineage["rollbacks"] == meta.rollbacks == [decision]
    straight = make_data_plan(strict, corpus).consumed(13)
    extra = {k: meta.consumed[k] - straight[k] for k in straight}
    assert sum(extra.values()) == 16
    assert [r["step"] for r in records(run)] == [4, 7, 11, 13]
    report = json.loads((run / "divergence" / "6.json").read_text())["examples"]
    assert len(report) == 16
    assert all(r["text"] and r["shard"].endswith(".records") for r in report)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "decided", "restored"])
def test_killed_around_a_rollback(strict, poison, tmp_path, monkeypatch, moment):
    """Whatever moment it dies at, the end is the same."""
    poison([(5, 3), (6, 0)], np.nan)
    straight = tmp_path / "straight"
    assert train.train(strict, straight, log=quiet) == 0

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    place = {
        "before": (train, "roll_back"),
        "decided": (divergence, "barrier"),
        "restored": (resume, "new_lineage"),
    }[moment]
    run = tmp_path / "run"
    with monkeypatch.context() as m:
        if moment == "restored":
            original = resume.new_lineage
            m.setattr(
                *place,
                lambda *a: die() if (run / "rollbacks.json").exists() else original(*a),
            )
        else:
            m.setattr(*place, die)
        with pytest.raises(Killed):
            train.train(strict, run, log=quiet)
    assert train.train(strict, run, log=quiet) == 0
    assert final(run).checksums == final(straight).checksums
    assert final(run).consumed == final(straight).consumed
    assert final(run).rollbacks == final(straight).rollbacks
    assert records(run) == records(straight)


@pytest.mark.slow
def test_stopped_after_a_rollback_and_resumed(strict, poison, tmp_path):
    poison([(5, 3), (6, 0)], np.nan)
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert train.train(strict, straight, log=quiet) == 0

    def log(text):
        if "step 11/" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train.train(strict, run, log=log) == train.PREEMPTED
    assert train.train(strict, run, log=quiet) == 0
    assert final(run).checksums == final(straight).checksums
    assert records(run) == records(straight)


@pytest.mark.slow
def test_checkpoints_of_the_abandoned_branch_go(small, poison, tmp_path):
    """A checkpoint between the first bad step and the decision is not resumed from."""
    cfg = dataclasses.replace(
        small,
        divergence=DivergenceConfig(nonfinite=3),
        checkpoint=dataclasses.replace(small.checkpoint, every_steps=1),
    )
    poison([(4, 0), (5, 0), (6, 0)], np.nan)
    run, said = tmp_path / "run", []
    assert train.train(cfg, run, log=said.append) == 0
    assert any("going back to step 3" in x for x in said)
    metas = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    assert [len(metas.meta(s).rollbacks) for s in (3, 4, 5, 6)] == [0, 1, 1, 1]
    metas.close()


@pytest.mark.slow
def test_a_spike_rolls_back(small, poison, tmp_path):
    cfg = dataclasses.replace(small, divergence=DivergenceConfig(spike=30.0, window=4))
    poison([(5, 3)], 1000.0)
    run, said = tmp_path / "run", []
    assert train.train(cfg, run, log=said.append) == 0
    assert any("loss" in x and "at step 5 is above" in x for x in said)
    (decision,) = json.loads((run / "rollbacks.json").read_text())["rollbacks"]
    assert decision["to"] == 3
    assert max(r["loss"] for r in records(run)) < 10


@pytest.mark.slow
def test_the_limit_stops_with_a_report(small, tmp_path, monkeypatch):
    weighted_loss = step.weighted_loss

    def loss(*args):
        loss_sum, sums = weighted_loss(*args)
        return loss_sum * jnp.nan, sums

    monkeypatch.setattr(step, "weighted_loss", loss)
    cfg = dataclasses.replace(
        small, divergence=DivergenceConfig(nonfinite=2, rollbacks=1)
    )
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"after 1 rollbacks.*of (en|ru|tr)/help"):
        train.train(cfg, run, log=quiet)
    assert len(json.loads((run / "rollbacks.json").read_text())["rollbacks"]) == 1
    # The same command comes to the same end: nothing was lost or added.
    with pytest.raises(UserError, match="after 1 rollbacks"):
        train.train(cfg, run, log=quiet)


def test_off_by_flag(small, poison, tmp_path):
    poison([(5, 3)], np.nan)
    cfg = dataclasses.replace(small, divergence=DivergenceConfig(skip=False))
    with pytest.raises(UserError, match="not finite at step 5"):
        train.train(cfg, tmp_path / "run", log=quiet)


def test_a_rollback_to_an_earlier_place_leaves_out_both(small, corpus):
    """Left out twice, the second time from an earlier step: neither comes back."""
    first = make_data_plan(small, corpus)
    one = {"skipped": first.positions(6, 6)}
    second = make_data_plan(small, corpus, None, [one])
    two = {"skipped": second.positions(4, 5)}
    third = make_data_plan(small, corpus, None, [one, two])

    def pairs(plan, a, b):
        examples = np.arange((a - 1) * 8, b * 8)
        return {*zip(*(x.tolist() for x in plan.lookup(examples)), strict=True)}

    everything = pairs(third, 1, 13)
    assert len(everything) == 13 * 8
    assert not everything & (pairs(first, 6, 6) | pairs(second, 4, 5))
    assert pairs(third, 1, 3) == pairs(first, 1, 3)


def test_the_watch_forgets_at_a_new_stage_and_survives_saving():
    cfg = DivergenceConfig(spike=20.0, window=8)

    def metrics(loss):
        return {"skipped": 0.0, "loss_sum": loss * 10, "target_count": 10.0}

    watch = DivergenceDetector(cfg)
    rng = np.random.default_rng(3)
    for k, loss in enumerate(4 + 0.1 * rng.normal(size=20)):
        assert watch.observe(k + 1, 0, metrics(loss)) is None
        watch = DivergenceDetector(cfg, json.loads(json.dumps(watch.to_json())))
    assert len(watch.losses) == 8
    assert watch.observe(21, 1, metrics(8.0)) is None  # another mixture
    assert DivergenceDetector(cfg, {**watch.to_json(), "losses": [4.0] * 8}).observe(
        22, 1, metrics(4.5)
    ) == (22, 22, "loss 4.5 at step 22 is above 4.08, from the 8 steps before")
    losses = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert spike_limit(losses, 2.0) == pytest.approx(3 + 2 * 1.4826)
