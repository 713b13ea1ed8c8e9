"""Control arms: the same examples and learning rate, other orders; their files."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax import cli
from gamayun_jax import config as c
from gamayun_jax.commands import data as commands
from gamayun_jax.data import control_files, controls
from gamayun_jax.data.corpus import expected_corpus
from gamayun_jax.data.plan import make_data_plan, unbuilt_plan
from gamayun_jax.training import compatibility, resume
from gamayun_jax.training.optimizer import learning_rate
from gamayun_jax.training.step import stage_tokens

SETTINGS = settings(max_examples=40, deadline=None)
SEQ_LEN = 4
MODEL = c.ModelConfig(8, 1, 8, 1, 1, 8, 8)


def staged(stages, sizes, **data):
    """A config of these stages, and a corpus of these sizes (source -> examples)."""
    cfg = c.Config(
        name="t",
        languages=tuple(dict.fromkeys(s.split("/")[0] for s in sizes)),
        model=MODEL,
        corpus=c.CorpusConfig(record_tokens=SEQ_LEN),
        stages=tuple(stages),
        data=c.DataConfig(seq_len=SEQ_LEN, max_epochs=math.inf, **data),
    )
    return cfg, expected_corpus(cfg, {k: n * SEQ_LEN for k, n in sizes.items()})


@st.composite
def staged_configs(draw, most_stages=3):
    """Configs whose stages' schedules are one over the run."""
    names = [f"l{i}/d" for i in range(draw(st.integers(1, 6)))]
    batch = draw(st.sampled_from([1, 2, 4, 8]))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=most_stages))
    tokens = [n * batch * SEQ_LEN for n in lengths]
    warmup = draw(st.integers(0, min(tokens)))
    decay = draw(st.integers(0, tokens[-1] - (warmup if len(tokens) == 1 else 0)))
    stages = []
    for k, n in enumerate(tokens):
        # Weights of 0, tiny ones and equal ones are the hard cases.
        weights = st.sampled_from([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0, 1.0, 3.0])
        raw = draw(
            st.lists(weights, min_size=len(names), max_size=len(names)).filter(any)
        )
        shares = {s: w / sum(raw) for s, w in zip(names, raw, strict=True)}
        ramp = dict(ramp=draw(st.sampled_from(["step", "linear", "cosine"])))
        ramp |= dict(ramp_tokens=draw(st.integers(0, n)))
        over = k > 0 and draw(st.booleans())  # a warm-up that is over may be left out
        schedule = c.ScheduleConfig(
            peak=1e-3,
            warmup_tokens=0 if over else warmup,
            decay_tokens=decay if k == len(tokens) - 1 else 0,
            decay_shape=draw(st.sampled_from(["linear", "1-sqrt"])),
            position="restart" if over and draw(st.booleans()) else "global",
        )
        mixture = c.MixtureConfig("explicit", shares, **ramp)
        # As many tokens as fit in these steps, or a few less.
        n -= draw(st.integers(0, SEQ_LEN - 1))
        stages.append(c.StageConfig(f"s{k}", n, mixture, schedule))
    sizes = {s: draw(st.integers(1, 50)) for s in names}
    block = draw(st.sampled_from([1, 2, 7, 32, 256]))
    return staged(stages, sizes, batch_size=batch, block_examples=block)


def served(plan):
    """The (source, position) of every example of a run, in its order."""
    source, position = plan.lookup(np.arange(plan.total_steps * plan.batch_size))
    return list(zip(source.tolist(), position.tolist(), strict=True))


def rates(cfg):
    """The learning rate of every step, at the middle of its tokens."""
    # Always as many, so that JAX compiles once.
    tokens = (np.arange(128) + 0.5) * cfg.tokens_per_step
    of_stage = [
        np.broadcast_to(
            learning_rate(s.schedule, tokens, *stage_tokens(cfg, k, 0)), tokens.shape
        )
        for k, s in enumerate(cfg.stages)
    ]
    return [of_stage[cfg.stage_at(k)][k] for k in range(cfg.total_steps)]


def made_or_refused(arm, base):
    """An arm, or why it cannot be."""
    try:
        return controls.make_arm(arm, base)
    except c.UserError as e:
        return str(e)


@SETTINGS
@given(staged_configs())
def test_every_arm_serves_the_same_examples_at_the_same_learning_rate(made):
    cfg, corpus = made
    base = controls.plan_base(cfg, corpus)
    examples, rate = served(base.plan), rates(cfg)
    for arm in controls.ARMS:
        of_arm = made_or_refused(arm, base)
        if isinstance(of_arm, str):  # a stage is too short for its part of it
            assert of_arm.startswith("arm reversed: the learning rate ")
            continue
        compatibility.check_schedules(of_arm)
        plan = make_data_plan(of_arm, corpus)
        assert plan.served(plan.total_steps) == base.plan.served(base.plan.total_steps)
        assert sorted(served(plan)) == sorted(examples)
        np.testing.assert_allclose(rates(of_arm), rate, rtol=1e-4, atol=1e-9)


@SETTINGS
@given(staged_configs())
def test_arms_have_the_order_that_they_say(made):
    cfg, corpus = made
    base = controls.plan_base(cfg, corpus)
    single = controls.make_arm("single", base)
    assert [len(single.stages), single.stages[0].mixture.ramp] == [1, "step"]
    stages = controls.reversed_stages(base)
    assert [s.name for s in stages] == [s.name for s in cfg.stages][::-1]
    plan = make_data_plan(dataclasses.replace(cfg, stages=stages), corpus)
    np.testing.assert_array_equal(controls.stage_counts(plan), base.counts[::-1])
    ramped = controls.make_arm("ramped", base)
    assert len(ramped.stages) in (1, 2)
    if len(ramped.stages) == 2:
        begin, slide = (s.mixture for s in ramped.stages)
        assert slide.ramp_tokens == ramped.stages[1].tokens
        change = base.shares[-1] - base.shares[0]
        names = base.plan.sources
        ends = [[m.shares.get(s, 0.0) for s in names] for m in (begin, slide)]
        slid = np.subtract(*ends[::-1])
        # Towards the last stage's mixture, but for whole examples in a short run.
        most = int(np.abs(change).argmax())
        slack = 4 * len(names) / base.counts.sum() + 2 * len(names) / max(
            1, base.counts.sum() - base.cfg.data.batch_size
        )
        assert slid[most] * np.sign(change[most]) > -slack


@pytest.fixture(scope="module")
def tiny():
    cfg = c.load_config(Path("experiments/tiny.py"))
    return controls.plan_base(cfg, unbuilt_plan(cfg)[0])


def test_the_slide_is_as_steep_as_shares_allow(tiny):
    begin, slide = controls.make_arm("ramped", tiny).stages
    warmup = tiny.cfg.stages[0].schedule.warmup_tokens
    step = tiny.cfg.tokens_per_step
    assert warmup <= begin.tokens < warmup + step
    # English of quality comes in the second stage alone: it begins at, or near, 0.
    first, last = (s.mixture.shares.get("en/hq", 0.0) for s in (begin, slide))
    assert first < 0.05 * last
    plan = make_data_plan(controls.make_arm("ramped", tiny), tiny.corpus)
    source, _ = plan.lookup(np.arange(plan.total_steps * plan.batch_size))
    halves = np.array_split(source == plan.sources.index("en/hq"), 2)
    assert halves[1].sum() > 2.5 * halves[0].sum()


def test_orders_are_the_arms_or_the_contents(tiny):
    """A shuffled stage stays so where it is moved, not where stages are mixed."""
    align, enrich = tiny.cfg.stages
    mixture = dataclasses.replace(align.mixture, order="shuffled")
    align = dataclasses.replace(align, mixture=mixture)
    cfg = dataclasses.replace(tiny.cfg, stages=(align, enrich))
    base = controls.plan_base(cfg, tiny.corpus)
    orders = {
        arm: [s.mixture.order for s in controls.make_arm(arm, base).stages]
        for arm in controls.ARMS
    }
    assert orders == {
        "single": ["interleaved"],
        "shuffled": ["shuffled"],
        "reversed": ["interleaved", "shuffled"],
        "ramped": ["interleaved", "interleaved"],
    }


def test_weights_go_with_the_content_and_transitions_with_time(tiny):
    align, enrich = tiny.cfg.stages
    other = c.TokenWeightConfig("none")
    reset = c.TransitionConfig(moments="reset")
    enrich = dataclasses.replace(enrich, token_weights=other, transition=reset)
    cfg = dataclasses.replace(tiny.cfg, stages=(align, enrich))
    made = controls.make_arm("reversed", controls.plan_base(cfg, tiny.corpus))
    first, last = made.stages
    assert [first.name, first.token_weights] == ["enrich", other]
    assert [last.name, last.token_weights] == ["align", align.token_weights]
    assert [first.transition, last.transition] == [align.transition, reset]
    assert last.schedule.decay_tokens == 400_000


@pytest.mark.parametrize(
    ("changes", "arm", "message"),
    [
        (["enrich.token_weights.scheme=none"], "single", "stages.enrich.token_weights"),
        (["enrich.token_weights.scheme=none"], "ramped", "stages.enrich.token_weights"),
        (["enrich.transition.moments=reset"], "single", "moments could be reset"),
        (["enrich.transition.cursors=restart"], "single", "cursors=restart: its exam"),
        (["enrich.schedule.kind=cosine"], "single", "stages.enrich.schedule.kind=cos"),
        (["enrich.schedule.peak=1e-3"], "single", "stages.enrich.schedule.peak=0.001"),
        (["enrich.schedule.position=restart"], "single", "warms up again: set 0"),
        (["align.schedule.decay_tokens=9"], "single", "align.schedule.decay_tokens=9"),
        (["enrich.schedule.decay_tokens=500000"], "single", "exceeds the stage's"),
        (
            ["enrich.schedule.warmup_tokens=1700000"],
            "single",
            "warmup_tokens=1700000 is not the first stage's 80000",
        ),
        (
            [
                "align.schedule.warmup_tokens=500000",
                "enrich.schedule.warmup_tokens=500000",
            ],
            "reversed",
            "warms up over the first 500000 tokens, but the arm's stage 'enrich'",
        ),
        (
            ["align.tokens=200000", "enrich.schedule.decay_tokens=300000"],
            "reversed",
            "decays over the last 300000 tokens, but the arm's stage 'align'",
        ),
    ],
)
def test_what_an_arm_cannot_keep_is_refused(changes, arm, message, tiny):
    path = Path("experiments/tiny.py")
    cfg = c.load_config(path, [f"stages.{change}" for change in changes])
    with pytest.raises(c.UserError) as e:
        controls.make_arm(arm, controls.plan_base(cfg, tiny.corpus))
    assert message in str(e.value)


def test_a_count_that_is_missed_is_named(tiny, monkeypatch):
    """Source, arm and both counts; a search that finds nothing ends there too."""
    short = dataclasses.replace(tiny.cfg.stages[1], tokens=300_000)
    cfg = dataclasses.replace(tiny.cfg, stages=(tiny.cfg.stages[0], short))
    other = make_data_plan(cfg, tiny.corpus)
    with pytest.raises(
        c.UserError, match=r"arm x: source 'en/help' would have 5\d+ ex"
    ):
        controls.check_counts("x", tiny.plan, other)
    monkeypatch.setattr(controls, "TRIES", 0)
    with pytest.raises(c.UserError, match="arm ramped: no slide gives all sources"):
        controls.make_arm("ramped", tiny)
    monkeypatch.setattr(controls, "to_fixed_point", lambda _: np.array([controls.ONE]))
    sizes = {"a/x": 9, "b/x": 9}
    half = c.MixtureConfig("explicit", dict.fromkeys(sizes, 0.5))
    stage = c.StageConfig("s", 80, half, c.ScheduleConfig())
    base = controls.plan_base(*staged([stage], sizes, batch_size=2, block_examples=2))
    wrong = dataclasses.replace(base, counts=base.counts + np.array([[1, -1]]))
    with pytest.raises(c.UserError, match="'a/x' would have 11 .* and has 10 in the"):
        controls.make_arm("single", wrong)


def test_counts_of_the_whole_path_at_full_size():
    """2.5T tokens: a share's smallest step is half an example there."""
    first = c.load_config(Path("experiments/stage1.py"))
    second = c.load_config(Path("experiments/stage2.py")).stages[0]
    weights = first.stages[0].token_weights
    second = dataclasses.replace(second, token_weights=weights)
    cfg = dataclasses.replace(first, stages=(*first.stages, second))
    base = controls.plan_base(cfg, unbuilt_plan(cfg)[0])
    for arm in controls.ARMS:
        controls.make_arm(arm, base)  # which compares the counts


# --- files and the command -------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "stage1", "stage2"])
def test_files_load_and_are_the_arms(name, tmp_path, capsys):
    """Also after a round trip through JSON, and with a --set of the base."""
    path, out = Path(f"experiments/{name}.py"), tmp_path / "deep" / "er"
    changes = ["seed=7", "data.corpus=not/built"]
    words = ["controls", str(path), "--out", str(out)]
    words += [w for change in changes for w in ("--set", change)]
    assert cli.main(words) == 0
    table, said = capsys.readouterr()
    cfg = c.load_config(path, changes)
    base = controls.plan_base(cfg, unbuilt_plan(cfg)[0])
    assert sorted(p.stem for p in out.iterdir()) == sorted(controls.ARMS)
    for arm in controls.ARMS:
        loaded = c.load_config(out / f"{arm}.py")
        assert loaded == controls.make_arm(arm, base)
        assert loaded.seed == 7
        assert c.from_json(c.to_json(loaded)) == loaded
        plan = unbuilt_plan(loaded)[1]
        total = base.plan.total_steps
        assert plan.served(plan.total_steps) == base.plan.served(total)
        text = (out / f"{arm}.py").read_text()
        base_line = next(x for x in text.splitlines() if x.startswith("BASE = "))
        relative = base_line.split('"')[1]
        assert not Path(relative).is_absolute()
        assert (out / relative).resolve() == path.resolve()
        others = [x for x in text.splitlines() if x != base_line]  # no path of the test
        assert max(map(len, others)) <= 88
    examples = total * base.plan.batch_size
    last = f"equal in every arm: {len(base.plan.sources)} sources, {examples:,} exam"
    assert last in table
    assert "en, all" in table
    assert "Make the arms again when it is built" in said
    assert ("has one stage" in said) == (name != "tiny")
    assert ("stages.enrich begins with a ramp" in said) == (name == "tiny")
    assert cli.main(words) == 0  # its own files are written anew
    (out / "single.py").write_text("mine = 1\n")
    assert cli.main(words) == 2
    assert "single.py exists and is no file of" in capsys.readouterr().err
    assert (out / "single.py").read_text() == "mine = 1\n"


def test_the_ledger_says_epochs_and_repeats():
    sizes = {"a/x": 4, "a/y": 40, "b/x": 40}
    shares = dict(zip(sizes, [0.3, 0.3, 0.4], strict=True))
    stage = c.StageConfig(
        "s", 80, c.MixtureConfig("explicit", shares), c.ScheduleConfig()
    )
    cfg, corpus = staged([stage], sizes, batch_size=2, block_examples=4)
    base = controls.plan_base(cfg, corpus)
    assert base.counts.tolist() == [[6, 6, 8]]
    plans = {"base": base.plan, "single": base.plan}
    told = control_files.ledger_text(plans, cfg, sizes).splitlines()
    assert [line.split() for line in told[1:-1]] == [
        ["source", "tokens", "epochs", "repeats", "base", "single"],
        ["a/x", "24", "1.50", "2", "6", "6"],
        ["a/y", "24", "0.15", "0", "6", "6"],
        ["a,", "all", "48", "0.27", "2", "12", "12"],
        ["b/x", "32", "0.20", "0", "8", "8"],
        ["all", "80", "0.24", "2", "20", "20"],
    ]
    assert told[-1] == "equal in every arm: 3 sources, 20 examples"
    other = dataclasses.replace(stage, tokens=160)
    longer = make_data_plan(dataclasses.replace(cfg, stages=(other,)), corpus)
    with pytest.raises(c.UserError, match="arm b: source 'a/x' would have 12 ex"):
        control_files.ledger_text({"base": base.plan, "b": longer}, cfg, sizes)


def recorded(plan, seq_len, **changes):
    """The last record of a run of a plan."""
    tokens = {k: n * seq_len for k, n in plan.served(plan.total_steps).items()}
    sources = {k: {"tokens": n} for k, n in {**tokens, **changes}.items()}
    return {"kind": "train", "step": plan.total_steps, "sources": sources}


def test_runs_are_checked_against_the_plan(tiny, tmp_path, capsys):
    plan, arm = tiny.plan, controls.make_arm("reversed", tiny)
    seq_len = tiny.cfg.data.seq_len
    of_arm = make_data_plan(arm, tiny.corpus)
    records = {
        "right": recorded(of_arm, seq_len),
        "wrong": recorded(of_arm, seq_len, **{"ru/help": 128, "xx/new": 7}),
        "early": {"kind": "train", "step": 5, "sources": {}},
    }
    for name, record in records.items():
        (tmp_path / name).mkdir()
        line = json.dumps(record) + "\n"
        (tmp_path / name / "metrics.jsonl").write_text('{"kind": "train"}\n' + line)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "lineage.json").write_text("{}\n")

    def check(*names):
        runs = [str(tmp_path / name) for name in names]
        return cli.main(["controls", "experiments/tiny.py", "--check", *runs])

    assert check("right") == 0
    assert "right: as planned, 13 sources, 2,002,944 tokens" in capsys.readouterr().out
    assert check("wrong", "right") == 2
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("wrong: 2 sources are not as planned")
    served = plan.served(plan.total_steps)["ru/help"] * seq_len
    assert told[2].split() == ["ru/help", f"{served:,}", "128", f"{128 - served:,}"]
    assert told[3].split() == ["xx/new", "0", "7", "+7"]
    assert "as planned" in told[4]
    assert check("early") == 2
    assert f"(at step 5 of {plan.total_steps})" in capsys.readouterr().out
    assert check("none") == 2
    assert "has no record of training" in capsys.readouterr().err


def test_the_command_wants_something_to_do(capsys):
    assert cli.main(["controls", "experiments/tiny.py"]) == 2
    assert "give --out DIR to write arms, or --check RUN" in capsys.readouterr().err
    hint = typing.get_type_hints(commands.make_controls)["arms"]
    known = typing.get_args(typing.get_args(typing.get_args(hint)[0])[0])
    assert list(known) == list(controls.ARMS) == list(control_files.ABOUT)


def test_arms_of_a_real_corpus_may_be_trained(config, corpus, tmp_path, capsys):
    """All that training checks before its first step."""
    cfg = c.set_fields(
        config,
        [
            "stages.enrich.token_weights.scheme=bytes",
            "stages.enrich.transition.moments=keep",
            "stages.enrich.mixture.ramp_tokens=0",
        ],
    )
    path = tmp_path / "small.py"
    path.write_text(
        "from gamayun_jax.config import from_json\n"
        f"def get_config():\n    return from_json({c.to_json(cfg)!r})\n"
    )
    words = ["controls", str(path), "--out", str(tmp_path / "arms")]
    assert cli.main([*words, "--arms", "ramped", "single"]) == 0
    table, said = capsys.readouterr()
    assert not said
    assert "?" not in table
    for arm in ("ramped", "single"):
        of_arm = c.load_config(tmp_path / "arms" / f"{arm}.py")
        resume.check_stages(of_arm, corpus, make_data_plan(of_arm, corpus))
    assert not (tmp_path / "arms" / "reversed.py").exists()
