"""Studies from their file to their records: alone, side by side, stopped, shared."""

import dataclasses
import json
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from gamayun_jax import cli
from gamayun_jax import config as c
from gamayun_jax.commands import study as commands
from gamayun_jax.data import build
from gamayun_jax.evaluate import alignment
from gamayun_jax.study import (
    design,
    findings,
    planning,
    records,
    registration,
    runner,
    side_by_side,
)
from gamayun_jax.training import step
from gamayun_jax.training.divergence import DivergedForGoodError, DivergenceDetector
from gamayun_jax.training.optimizer import learning_rate
from gamayun_jax.training.run_folder import RunFolder
from gamayun_jax.training.step import stage_tokens

OUTCOMES = (
    design.Outcome("others", ("udhr",)),
    design.Outcome("en", ("udhr",), "en"),
    design.Outcome("facts", ("cldr_facts",)),
    design.Outcome("answers", ("answer:cldr_facts",)),
    design.Outcome("missed", ("retrieval:udhr:0", "retrieval:udhr:last"), "all"),
)
MEASURES = ("answer:cldr_facts", "retrieval:udhr:0", "retrieval:udhr:last")


def one_schedule(cfg):
    """The small config as twins need it: one schedule, weights that stay."""
    align, enrich = cfg.stages
    schedule = dataclasses.replace(align.schedule, decay_tokens=0)
    last = dataclasses.replace(schedule, decay_tokens=enrich.tokens)
    mixture = dataclasses.replace(enrich.mixture, ramp="step", ramp_tokens=0)
    stages = (
        dataclasses.replace(align, schedule=schedule),
        dataclasses.replace(
            align, name="enrich", tokens=enrich.tokens, schedule=last, mixture=mixture
        ),
    )
    checkpoint = c.CheckpointConfig(every_steps=2, keep=2, keep_every_steps=2)
    tasks = {"tasks": ("cldr_facts",), "task_items": 5}
    asked = dataclasses.replace(cfg.evaluation, **tasks)
    return dataclasses.replace(
        cfg, stages=stages, checkpoint=checkpoint, evaluation=asked
    )


def small_study(cfg, **changes):
    """Two arms, two seeds; the twin's measured parameters are an average."""
    arms = (
        design.Arm({"order": "staged"}, cfg, (0, 1)),
        design.Arm({"order": "single"}, cfg, (0, 1), "single", cfg.stages[1].tokens),
    )
    hypotheses = (
        design.Hypothesis("h", "c", {"order": "single"}, {"order": "staged"}),
    )
    return design.Study(
        **{
            "name": "s",
            "question": "q?",
            "arms": arms,
            "outcomes": OUTCOMES,
            "primary": "others",
            "hypotheses": hypotheses,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def base(config):
    return one_schedule(config)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """A finished study, its runs made one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    assert runner.run_study(small_study(base), folder, keep_runs=True) == 0
    return folder


@pytest.mark.slow
def test_alone_and_side_by_side_agree(alone, base, tmp_path):
    """Same examples, rates and averages; numbers but for the order of sums."""
    study = small_study(base)
    assert runner.run_study(study, tmp_path, side_by_side=3) == 0
    one, other = records.read_records(alone), records.read_records(tmp_path)
    assert (
        set(one) == set(other) == {(a, s) for a in ("staged", "single") for s in (0, 1)}
    )
    for key, record in one.items():
        twin = other[key]
        for name in ("served", "steps", "tokens", "sha256", "corpus"):
            assert record[name] == twin[name], name
        for point, same in zip(record["curve"], twin["curve"], strict=True):
            assert point["step"] == same["step"]
            np.testing.assert_allclose(point["loss"], same["loss"], rtol=1e-4)
            assert point["languages"].keys() == same["languages"].keys()
        for part in ("sets", "raw") if key[0] == "single" else ("sets",):
            assert set(record[part]) == {"udhr", "cldr_facts", *MEASURES}
            for name, by in record[part].items():
                # Rounding may turn one retrieval of ten units in two languages.
                error = 0.051 if "retrieval" in name else 0.0
                assert by == pytest.approx(twin[part][name], rel=1e-3, abs=error)
    # The average is another model than the last parameters, by far more than rounding.
    for record in (one["single", 0], other["single", 0]):
        gaps = [
            abs(record["sets"]["udhr"][k] / record["raw"]["udhr"][k] - 1)
            for k in record["raw"]["udhr"]
        ]
        assert max(gaps) > 3e-3
    assert records.read_units(alone) == records.read_units(tmp_path)
    # Arms share the seed's initialisation and examples; seeds do not.
    assert one["single", 0]["served"] == one["staged", 0]["served"]
    assert one["single", 0]["curve"] != one["single", 1]["curve"]


def test_bits_per_byte_are_those_of_the_units(alone):
    (units,) = records.read_units(alone).values()
    for (arm, seed), record in records.read_records(alone).items():
        for language, bits in record["bits"]["udhr"].items():
            size = sum(units["udhr"][language]["bytes"])
            assert sum(bits) / size == pytest.approx(
                record["sets"]["udhr"][language], abs=1e-3
            )
        run = alone / "runs" / arm / str(seed)
        evaluation = json.loads((run / f"eval/{record['steps']}.json").read_text())
        last = record.get("raw", record["sets"])
        for language, row in evaluation["sets"]["udhr"]["languages"].items():
            assert last["udhr"][language] == pytest.approx(row["bits_per_byte"])


def test_a_task_is_an_outcome(alone, base):
    """Its questions are units of one size; a choice is one of four, so about 2 bits."""
    (units,) = records.read_units(alone).values()
    tasks = registration.tasks_of(base)
    for record in records.read_records(alone).values():
        for language, bits in record["bits"]["cldr_facts"].items():
            items = tasks["cldr_facts"].items[language]
            row = units["cldr_facts"][language]
            assert row == {"ids": [i["id"] for i in items], "bytes": [1] * 5}
            assert np.mean(bits) == pytest.approx(
                record["sets"]["cldr_facts"][language], abs=0.01
            )
            assert 0.5 < np.mean(bits) < 8
    found = findings.analyse(alone)
    assert [found.unit(o.name) for o in OUTCOMES] == [
        *("bits per byte", "bits per byte", "bits per question", "bits per byte"),
        "share of translations missed",
    ]
    frozen = json.loads((alone / registration.FILE).read_text())
    for arm in frozen["study"]["arms"]:
        assert arm["config"]["evaluation"]["tasks"] == ["cldr_facts"]
        assert arm["tasks"] == {"cldr_facts": tasks["cldr_facts"].hash}


def test_right_answers_and_retrieval_are_outcomes(alone, base):
    """Against what `gamayun align` and the run's own evaluation say of it."""
    workdir = alone / "runs" / "staged" / "0"
    record = records.read_records(alone)["staged", 0]
    (units,) = records.read_units(alone).values()
    task = json.loads((workdir / f"eval/{base.total_steps}.json").read_text())["tasks"]
    for language, row in task["cldr_facts"]["languages"].items():
        found = record["sets"]["answer:cldr_facts"][language]
        assert found == pytest.approx(row["answer_bits_per_byte"], abs=1e-6)
    told = alignment.align(workdir, corpus_folder=Path(base.data.corpus))
    accuracy = told["sets"]["udhr"]["retrieval"]["plain"]["accuracy"]
    for name, layer in (("retrieval:udhr:0", 0), ("retrieval:udhr:last", 2)):
        for language, others in accuracy.items():
            missed = 1 - np.mean([by[layer] for by in others.values()])
            assert record["sets"][name][language] == pytest.approx(missed, abs=1e-6)
            each = record["bits"][name][language]
            assert np.mean(each) == pytest.approx(missed, abs=0.01)
            assert units[name][language]["bytes"] == [1] * len(each) == [1] * 10
    assert "retrieval:udhr:1" not in record["sets"]  # nobody asked


def test_bits_of_the_right_choice():
    """By hand: shares 1/2, 1/4, 1/8, 1/8; without the question the first has twice
    what each other has."""
    row = {"logprobs": np.log([0.5, 0.25, 0.125, 0.125]).tolist()}
    told = [records.choice_bits(row | {"answer": n}) for n in range(4)]
    np.testing.assert_allclose(told, [1, 2, 3, 3])
    row["unconditional"] = np.log([0.4, 0.2, 0.2, 0.2]).tolist()
    told = [records.choice_bits(row | {"answer": n}) for n in range(4)]
    np.testing.assert_allclose(told, np.log2([3.0, 3.0, 6.0, 6.0]))
    far = {"logprobs": [-5000.0, -1.0], "answer": 0}  # no underflow
    assert records.choice_bits(far) == pytest.approx(4999 / np.log(2))


def test_a_finished_study_trains_nothing(alone, base, monkeypatch):
    monkeypatch.setattr(runner, "train", None)
    monkeypatch.setattr(runner, "train_group", None)
    assert runner.run_study(small_study(base), alone) == 0
    assert runner.run_study(small_study(base), alone, side_by_side=2) == 0


def test_rates_of_all_steps_are_those_of_the_step(base):
    for stages in (base.stages, base.stages[1:]):
        cfg = dataclasses.replace(base, stages=stages)
        rates = side_by_side.rates_of(cfg)
        assert rates.shape == (cfg.total_steps,)
        for k in range(cfg.total_steps):
            stage = cfg.stage_at(k)
            tokens = (k + 0.5) * cfg.tokens_per_step
            wanted = learning_rate(
                cfg.stages[stage].schedule, tokens, *stage_tokens(cfg, stage, 0)
            )
            assert float(rates[k]) == pytest.approx(float(wanted), rel=1e-6)


def test_the_registration_is_of_no_machine(alone, base):
    text = (alone / registration.FILE).read_text()
    assert base.data.corpus not in text
    assert str(c.DEMO_CORPUS) not in text
    frozen = registration.read_registration(alone)
    assert frozen["sha256"] == records.read_records(alone)["single", 1]["sha256"]
    assert all(a["served"] for a in frozen["study"]["arms"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(primary="en"), "study.primary: 'others' -> 'en'"),
        (dict(hypotheses=()), "hypotheses"),
        (dict(noise=0.1), "study.noise: 0.0 -> 0.1"),
    ],
)
def test_a_changed_study_is_refused(alone, base, change, said):
    with pytest.raises(c.UserError, match="has changed since it was registered") as e:
        runner.run_study(small_study(base, **change), alone)
    assert said in str(e.value)


def test_other_arms_rates_and_data_change_the_hash(base):
    study = small_study(base)
    hashes = {registration.registration(study, registration.make_arms(study))["sha256"]}
    peak = dataclasses.replace(
        base,
        stages=tuple(
            dataclasses.replace(s, schedule=dataclasses.replace(s.schedule, peak=1e-3))
            for s in base.stages
        ),
    )
    more = dataclasses.replace(study.arms[0], seeds=(0, 1, 2))
    for other in (
        small_study(peak),
        small_study(base, arms=(more, study.arms[1])),
        small_study(base, question="another?"),
    ):
        made = registration.make_arms(other)
        hashes.add(registration.registration(other, made)["sha256"])
    assert len(hashes) == 4


def test_an_edited_registration_is_refused(alone, base, tmp_path):
    text = (alone / registration.FILE).read_text()
    (tmp_path / registration.FILE).write_text(text.replace('"q?"', '"r?"'))
    with pytest.raises(c.UserError, match="was edited after it was frozen"):
        runner.run_study(small_study(base), tmp_path)
    (tmp_path / registration.FILE).write_text("{")
    with pytest.raises(c.UserError, match="registration.json is damaged"):
        runner.run_study(small_study(base), tmp_path)


def test_a_field_that_a_later_release_adds_is_no_change(base, tmp_path):
    """While it is at its default; the hash stays the registered one."""
    study = small_study(base)
    made = registration.make_arms(study)
    frozen = registration.registration(study, made)
    plain = json.loads(json.dumps({k: frozen[k] for k in ("study", "analysis")}))
    for arm in plain["study"]["arms"]:
        del arm["config"]["optimizer"]["ema_tokens"]
    sha256 = registration.digest(plain)
    (tmp_path / registration.FILE).write_text(json.dumps({"sha256": sha256, **plain}))
    assert registration.register(tmp_path, study, made) == sha256
    assert f"registration: {sha256}" in planning.plan_text(study, tmp_path)
    optimizer = dataclasses.replace(base.optimizer, ema_tokens=4096)
    changed = small_study(dataclasses.replace(base, optimizer=optimizer))
    with pytest.raises(c.UserError, match="ema_tokens: 0 -> 4096"):
        registration.register(tmp_path, changed, registration.make_arms(changed))


def test_records_of_another_study_or_run_are_refused(alone, tmp_path):
    record = records.read_records(alone)["single", 0]
    records.write_record(tmp_path, record)
    with pytest.raises(c.UserError, match="belongs to another registration"):
        records.read_records(tmp_path, "0" * 64)
    path = records.record_path(tmp_path, "single", 0)
    path.rename(path.with_name("7.json"))
    with pytest.raises(c.UserError, match="is the record of arm single, seed 0"):
        records.read_records(tmp_path)
    path.with_name("7.json").write_text("[]")
    with pytest.raises(c.UserError, match=r"is damaged \(.*\): delete it"):
        records.read_records(tmp_path)


def test_a_run_that_diverges_is_recorded_as_that(base, tmp_path, monkeypatch):
    """And the others go on."""
    made = []

    def train(cfg, workdir, log):
        made.append(cfg.name)
        raise DivergedForGoodError("training diverges: of course")

    monkeypatch.setattr(runner, "train", train)
    said = []
    assert runner.run_study(small_study(base), tmp_path, log=said.append) == 0
    assert made == ["staged-0", "single-0", "staged-1", "single-1"]  # seed by seed
    for record in records.read_records(tmp_path).values():
        assert record["status"] == "diverged"
        assert "of course" in record["why"]
        assert "sets" not in record
    assert sum("DIVERGED" in line for line in said) == 4


@pytest.mark.slow
def test_a_group_without_the_guard_still_records_its_other_runs(base, tmp_path):
    """A run that is not finite is diverged, whatever its config lets pass."""
    free = dataclasses.replace(
        base, divergence=c.DivergenceConfig(nonfinite=0, skip=False)
    )
    stages = tuple(
        dataclasses.replace(s, schedule=dataclasses.replace(s.schedule, peak=1e30))
        for s in free.stages
    )
    arms = (
        design.Arm({"rate": "high"}, dataclasses.replace(free, stages=stages), (0, 1)),
        design.Arm({"rate": "low"}, free, (0, 1)),
    )
    study = small_study(base, arms=arms, hypotheses=())
    assert runner.run_study(study, tmp_path, side_by_side=4) == 0
    found = {k: r["status"] for k, r in records.read_records(tmp_path).items()}
    assert found == {
        ("high", 0): "diverged", ("high", 1): "diverged", ("low", 0): "done",
        ("low", 1): "done",
    }  # fmt: skip


def test_a_group_tells_runs_that_diverge(base):
    arm = design.Arm({"order": "staged"}, base, (0,))
    made = registration.MadeArm(arm, base, None, None)
    assert not runner.divergence_of(made, side_by_side.Trained([{}], [], 2))
    why = runner.divergence_of(made, side_by_side.Trained([{}], [], 3))
    assert "3 steps in a row was not finite" in why
    never = dataclasses.replace(base, divergence=c.DivergenceConfig(nonfinite=0))
    free = registration.MadeArm(arm, never, None, None)
    assert not runner.divergence_of(free, side_by_side.Trained([{}], [], 9))


def test_steps_in_a_row_are_counted_as_the_detector_does():
    """Of many runs at once, on the device."""
    skipped_KN = np.random.default_rng(0).integers(0, 2, (40, 8)).astype(np.float32)
    rows = np.zeros((2, 8), np.float32)
    for skipped_N in skipped_KN:
        rows = side_by_side.count_in_a_row(rows, skipped_N)
    for n in range(8):
        most = int(rows[1][n])
        for limit in (most, most + 1):
            detector = DivergenceDetector(c.DivergenceConfig(nonfinite=limit))
            told = [
                detector.observe(
                    k + 1, 0, {"skipped": x, "loss_sum": 1.0, "target_count": 1.0}
                )
                for k, x in enumerate(skipped_KN[:, n])
            ]
            assert any(told) == (limit == most)


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize(
    ("at", "status"), [((1, 3, 5, 7), "done"), ((1, 4, 5), "diverged")]
)
def test_skipped_steps_apart_are_no_divergence(
    base, tmp_path, monkeypatch, at, status, group
):
    """Alone or side by side: in a row they are, and nothing is taken back."""
    update = step.update

    def poisoned(state, *rest):
        new, metrics = update(state, *rest)
        bad = jnp.isin(state.step, jnp.array(at))
        return new, {**metrics, "skipped": jnp.where(bad, 1.0, 0.0)}

    monkeypatch.setattr(step, "update", poisoned)
    monkeypatch.setattr(side_by_side, "update", poisoned)
    # A config of its own, or JAX would take the step that it has traced before.
    mine = c.DivergenceConfig(nonfinite=2, window=100 + 10 * len(at) + group)
    cfg = dataclasses.replace(base, divergence=mine)
    arms = (design.Arm({"order": "staged"}, cfg, (0,)),)
    study = small_study(cfg, arms=arms, hypotheses=(), matched=None)
    assert runner.run_study(study, tmp_path, side_by_side=group) == 0
    (record,) = records.read_records(tmp_path).values()
    assert record["status"] == status
    assert not list(tmp_path.rglob("rollbacks.json"))


def test_a_signal_stops_a_study(base, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda *args, **more: runner.PREEMPTED)
    assert runner.run_study(small_study(base), tmp_path) == runner.PREEMPTED
    assert not records.read_records(tmp_path)


@pytest.mark.parametrize("group", [0, 2])
def test_claimed_runs_are_left_alone(base, tmp_path, group):
    """From the first step to the record, also of groups."""
    made = registration.make_arms(small_study(base))
    todo = [(made[a], s) for s in (0, 1) for a in ("staged", "single")]
    size = group or 1
    with runner.claimed(tmp_path, todo, size) as mine:
        assert mine == todo[:size]
        with runner.claimed(tmp_path, todo, 4) as others:
            assert others == todo[size:]
    records.write_record(
        tmp_path,
        {"arm": "staged", "seed": 0, "sha256": "", "status": "diverged", "why": ""},
    )
    with runner.claimed(tmp_path, todo, 4) as mine:
        assert mine == todo[1:]


def test_a_registration_is_not_written_where_other_records_lie(alone, base, tmp_path):
    records.write_record(tmp_path, records.read_records(alone)["single", 0])
    other = small_study(base, question="another?")
    with pytest.raises(c.UserError, match="belongs to another registration"):
        runner.run_study(other, tmp_path)
    assert not (tmp_path / registration.FILE).exists()
    with pytest.raises(c.UserError, match="no arm is like 'zz'"):
        runner.run_study(small_study(base), tmp_path, arms="zz")


def test_processes_share_the_runs(base, tmp_path, monkeypatch):
    """A run that another process makes is left to it, and waited for."""
    taken = []
    other = RunFolder(tmp_path / "runs/staged/0")

    def train(cfg, workdir, log):
        RunFolder(workdir).close()
        taken.append(cfg.name)
        if len(taken) == 3:  # by now the study is registered
            later.start()
        raise DivergedForGoodError("not trained here")

    def finish_later():
        record = {"arm": "staged", "seed": 0, "status": "diverged", "why": "elsewhere"}
        sha256 = registration.read_registration(tmp_path)["sha256"]
        records.write_record(tmp_path, record | {"sha256": sha256})
        other.close()

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    later = threading.Timer(0.5, finish_later)
    assert runner.run_study(small_study(base), tmp_path) == 0
    later.join()
    assert sorted(taken) == ["single-0", "single-1", "staged-1"]
    assert records.read_records(tmp_path)["staged", 0]["why"] == "elsewhere"


def test_what_cannot_be_done_side_by_side_is_refused(config):
    cfg = dataclasses.replace(config, name="resets")
    with pytest.raises(c.UserError, match=r"resets: .*moments=reset is not done side"):
        side_by_side.check_members([side_by_side.Member(cfg, None)])
    spikes = dataclasses.replace(cfg, divergence=c.DivergenceConfig(spike=20.0))
    with pytest.raises(c.UserError, match=r"divergence.spike is not looked at side"):
        side_by_side.check_members([side_by_side.Member(spikes, None)])


# --- bad designs ------------------------------------------------------------------


A_BEFORE_B = design.Hypothesis("h", "", {"order": "a"}, {"order": "b"})


def arm(levels, seeds=(0, 1), **more):
    return design.Arm(levels, more.pop("cfg", small_config("x")), seeds, **more)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(arms=()), "arms is empty"),
        (dict(arms=(arm({"order": "a"}), arm({"order": "a"}))), "two arms are 'a'"),
        (dict(arms=(arm({"order": "a"}, (0, 0)),)), "each once"),
        (dict(arms=(arm({"order": "a"}, ()),)), "each once"),
        (dict(arms=(arm({"order": "a"}), arm({"way": "b"}))), "has the factors way"),
        (dict(arms=(arm({"order": "a"}, average_tokens=9),)), "keep_every_steps"),
        (dict(primary="english"), "no outcome is called 'english'; there are others"),
        (dict(matched=("size",)), "matched names 'size', which is no factor"),
        (
            dict(hypotheses=(design.Hypothesis("h", "", {"order": "a"}, {}, "z"),)),
            "no outcome is called 'z'",
        ),
        (
            dict(hypotheses=(design.Hypothesis("h", "", {"order": "z"}, {}),)),
            "hypothesis 'h': 0 arms have {'order': 'z'}",
        ),
        (
            dict(
                hypotheses=(design.Hypothesis("h", "", {"order": "a"}, {"order": "a"}),)
            ),
            "compares arm a with itself",
        ),
        (
            dict(
                arms=(arm({"order": "a"}), arm({"order": "b"}, (1, 2))),
                hypotheses=(A_BEFORE_B,),
            ),
            "share 1 seeds",
        ),
        (dict(noise=-1.0), "study.noise"),
        (dict(outcomes=(design.Outcome("others", ()),)), "sets is empty"),
        (
            dict(outcomes=(*OUTCOMES, design.Outcome("seed", ("udhr",)))),
            "'seed' is called as another column",
        ),
        (
            dict(outcomes=(*OUTCOMES, design.Outcome("a\nb", ("udhr",)))),
            "write it on one line",
        ),
    ],
)
def test_bad_designs_are_named(change, said):
    good = dict(
        name="s",
        question="q",
        arms=(arm({"order": "a"}), arm({"order": "b"})),
        outcomes=OUTCOMES,
        primary="others",
        hypotheses=(),
    )
    design.Study(**good)
    with pytest.raises(c.UserError) as e:
        design.Study(**good | change)
    assert said in str(e.value)


def test_arms_that_are_not_matched_are_named(base):
    align, enrich = base.stages
    more = dataclasses.replace(
        base, stages=(align, dataclasses.replace(enrich, mixture=align.mixture))
    )
    arms = (arm({"order": "a"}, cfg=base), arm({"order": "b"}, cfg=more))
    with pytest.raises(c.UserError, match=r"arms a and b are declared matched, but"):
        registration.make_arms(small_study(base, arms=arms, hypotheses=()))
    free = small_study(base, arms=arms, hypotheses=(), matched=None)
    assert set(registration.make_arms(free)) == {"a", "b"}
    restarts = dataclasses.replace(
        enrich, transition=c.TransitionConfig(cursors="restart")
    )
    again = dataclasses.replace(base, stages=(align, restarts))
    arms = (arm({"order": "a"}, cfg=base), arm({"order": "b"}, cfg=again))
    with pytest.raises(c.UserError, match="arm b: a stage restarts its data cursors"):
        registration.make_arms(small_study(base, arms=arms, hypotheses=()))


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (
            design.Outcome("o", ("help",)),
            "'help', which is no held-out set of the corpus of arm staged and no task",
        ),
        (
            design.Outcome("o", ("udhr",), "xx"),
            "languages='xx', and 'udhr' has",
        ),
        (
            design.Outcome("o", ("udhr", "cldr_facts")),
            "some are measured in bits per byte and some in bits per question",
        ),
        (
            design.Outcome("o", ("udhr", "retrieval:udhr:1")),
            "bits per byte and some in share of translations missed",
        ),
        (
            design.Outcome("o", ("retrieval:udhr:3",)),
            r"retrieval:SET:LAYER of parallel sets \(LAYER: 0 to 2, last\)",
        ),
        (
            design.Outcome("o", ("answer:udhr",)),
            "'answer:udhr', which is no held-out set .* answer:TASK of multiple choice",
        ),
    ],
)
def test_outcomes_without_texts_are_named(base, outcome, said):
    study = small_study(base, outcomes=(outcome,), primary="o", hypotheses=())
    with pytest.raises(c.UserError, match=said):
        registration.make_arms(study)


def test_arms_scored_on_other_texts_are_refused(base, tmp_path):
    """Before anything is trained, and only where a hypothesis compares them."""
    (held,) = base.corpus.heldout
    other = dataclasses.replace(
        base.corpus,
        heldout=(dataclasses.replace(held, files={"en": held.files["en"]}),),
        tokenizer=c.TokenizerConfig(model=f"{base.data.corpus}/tokenizer.model"),
    )
    folder = tmp_path / "corpus"
    data = dataclasses.replace(base.data, corpus=str(folder))
    cfg = dataclasses.replace(base, corpus=other, data=data)
    build.build(cfg, folder, workers=1, progress=False)
    arms = (
        design.Arm({"order": "staged"}, base, (0, 1)),
        design.Arm({"order": "single"}, cfg, (0, 1)),
    )
    outcomes = {"outcomes": (design.Outcome("en", ("udhr",), "en"),), "primary": "en"}
    study = small_study(base, arms=arms, matched=None, **outcomes)
    said = r"'h': arms single and staged do not have the same held-out .*udhr in ru"
    with pytest.raises(c.UserError, match=said):
        registration.make_arms(study)
    free = small_study(base, arms=arms, matched=None, hypotheses=(), **outcomes)
    assert set(registration.make_arms(free)) == {"staged", "single"}


@pytest.mark.parametrize("levels", [{}, *({"a": x} for x in ("b/c", "..", "", 1))])
def test_levels_are_names_of_files(base, levels):
    said = "becomes part of a file's name" if levels else "give it one"
    with pytest.raises(c.UserError, match=said):
        design.Arm(levels, base, (0,))


def test_matched_arms_read_one_text_in_one_length(base):
    """Equal counts of examples are not enough."""
    made = registration.make_arms(small_study(base, hypotheses=()))
    one, other = made.values()
    data = dataclasses.replace(one.cfg.data, seq_len=32)
    short = dataclasses.replace(
        other, cfg=dataclasses.replace(other.cfg, data=data), plan=one.plan
    )
    with pytest.raises(c.UserError, match=r"64 and 32 tokens \(data.seq_len\)"):
        registration.check_exposure([one, short])
    sources = dict(one.corpus.manifest["sources"])
    sources["tr/help"] = sources["ru/help"]
    swapped = dataclasses.replace(
        one.corpus, manifest={**one.corpus.manifest, "sources": sources}
    )
    with pytest.raises(c.UserError, match="tr/help has other text in the corpus of"):
        registration.check_exposure([one, dataclasses.replace(one, corpus=swapped)])


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"max_units": 8}, "evaluation.max_units"),
        ({"task_items": 4}, "evaluation.task_items"),
        ({"tasks": ("cldr_facts", "last_word")}, "task last_word"),
    ],
)
def test_arms_of_a_hypothesis_are_asked_the_same(base, field, said):
    less = dataclasses.replace(base.evaluation, **field)
    arms = (
        arm({"order": "a"}, cfg=base),
        arm({"order": "b"}, cfg=dataclasses.replace(base, evaluation=less)),
    )
    study = small_study(base, arms=arms, hypotheses=(A_BEFORE_B,))
    with pytest.raises(c.UserError, match=rf"held-out texts and tasks \({said}\), so"):
        registration.make_arms(study)
    registration.make_arms(small_study(base, arms=arms, hypotheses=()))


# --- the plan and the command -----------------------------------------------------


def test_the_plan_says_cost_exposure_and_power(alone, base, tmp_path):
    study = small_study(base, noise=0.01, worthwhile=0.02)
    text = planning.plan_text(study, tmp_path)
    assert "0 of 2" in text
    assert "equal in every arm: 3 sources" in text
    # t(.975, 1) + t(.8, 1) = 12.71 + 1.376; times 0.01 / sqrt(2)
    assert "h: 0.0996 with 2 seeds  UNDERPOWERED for 0.02" in text
    assert "measure the standard deviation" in planning.plan_text(
        small_study(base), tmp_path
    )
    done = planning.plan_text(small_study(base), alone)
    assert "2 of 2" in done
    assert "0.0e+00 FLOPs to do; about 0.0 h left" in done


def test_the_command(alone, base, tmp_path, monkeypatch, capsys):
    """A study file from the command line; wrong ones get one line."""
    (tmp_path / "base.json").write_text(c.to_json(base))
    file = tmp_path / "study.py"
    file.write_text(
        "from pathlib import Path\n"
        "from gamayun_jax import config as c\n"
        "from tests.study.test_runner import small_study\n"
        "def get_study():\n"
        "    text = (Path(__file__).parent / 'base.json').read_text()\n"
        "    return small_study(c.from_json(text))\n"
    )
    assert cli.main(["study", str(file), "--out", str(alone), "--plan"]) == 0
    sha256 = registration.read_registration(alone)["sha256"]
    assert f"registration: {sha256}" in capsys.readouterr().out
    shown = []
    monkeypatch.setattr(commands, "show_study", shown.append)
    assert cli.main(["study", str(file), "--out", str(alone)]) == 0
    assert shown == [alone]
    for text, said in (
        ("x = 1", "does not define get_study"),
        ("def get_study(): return 1", "returned int, not Study"),
        ("def get_study(): 1 / 0", "line 1: ZeroDivisionError"),
    ):
        file.write_text(text)
        assert cli.main(["study", str(file), "--out", str(tmp_path / "o")]) == 2
        assert said in capsys.readouterr().err
    assert json.loads((alone / registration.FILE).read_text())["sha256"] == sha256
