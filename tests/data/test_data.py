"""Batches: documents kept apart, and the same rows for any number of hosts."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import (
    MixtureConfig,
    TokenWeightConfig,
    TransitionConfig,
    UserError,
)
from gamayun_jax.data import loader
from gamayun_jax.data.continuity import fingerprint
from gamayun_jax.data.loader import host_rows, local_batches, make_batch
from gamayun_jax.data.plan import Skipped, make_data_plan, mixture_notes
from gamayun_jax.data.tokenizer import Boundaries
from gamayun_jax.model import sharding
from gamayun_jax.training.compatibility import check_past
from gamayun_jax.training.corpus_changes import check_contents, corpus_changes
from gamayun_jax.training.run_meta import RunMeta

BOS, PAD, EOS = 1, 0, 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([BOS, EOS, 5, 6, 7]), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 9),
)
def test_a_batch_by_hand(rows, padding):
    tokens = np.array(rows, np.int32)
    tokens[-1, 9 - padding :] = PAD
    languages = np.arange(len(rows), dtype=np.int32)
    batch = make_batch(tokens, languages, Boundaries(BOS, EOS, PAD))
    for r, row in enumerate(tokens.tolist()):
        segment, position = 1, -1
        for t in range(8):
            if row[t] == BOS:
                segment += t > 0
                position = -1
            position += 1
            is_pad = row[t] == PAD
            assert batch["inputs"][r, t] == row[t]
            assert batch["targets"][r, t] == row[t + 1]
            assert batch["segment_ids"][r, t] == (0 if is_pad else segment)
            assert batch["positions"][r, t] == (0 if is_pad else position)
            assert batch["loss_mask"][r, t] == (row[t + 1] not in (PAD, BOS))
            assert batch["language"][r, t] == r
    assert {v.dtype.name for k, v in batch.items()} == {"int32", "float32"}


def read(config, corpus, plan, rows, first=0, steps=13):
    source = iter(local_batches(config, corpus, plan, rows, first))
    return [next(source) for _ in range(steps - first)]


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_hosts(config, corpus, hosts):
    plan = make_data_plan(config, corpus)
    whole = read(config, corpus, plan, np.arange(8))
    per = 8 // hosts
    parts = [
        read(config, corpus, plan, np.arange(h * per, (h + 1) * per))
        for h in range(hosts)
    ]
    for step, batch in enumerate(whole):
        for key, values in batch.items():
            joined = np.concatenate([p[step][key] for p in parts])
            np.testing.assert_array_equal(joined, values)


def test_reading_from_the_middle(config, corpus):
    plan = make_data_plan(config, corpus)
    whole, rest = (read(config, corpus, plan, np.arange(8), k) for k in (0, 9))
    for a, b in zip(whole[9:], rest, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])


def test_an_epoch_serves_every_record_once_and_the_next_in_another_order(
    config, corpus, replace
):
    size = corpus.sources["tr/help"].records
    steps = -(-2 * size // 8)
    stage = dataclasses.replace(
        config.stages[0],
        tokens=steps * 8 * 64,
        mixture=dataclasses.replace(config.stages[0].mixture, shares={"tr/help": 1.0}),
    )
    cfg = dataclasses.replace(config, stages=(stage,))
    plan = make_data_plan(cfg, corpus)
    batches = read(cfg, corpus, plan, np.arange(8), steps=steps)
    inputs = np.concatenate([b["inputs"] for b in batches])
    epochs = [
        [row.tobytes() for row in inputs[k * size : (k + 1) * size]] for k in (0, 1)
    ]
    records = corpus.records("tr/help")
    everything = sorted(records[i][:-1].tobytes() for i in range(size))
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]


def test_every_token_of_a_source_is_a_target_once(corpus):
    """But for the first of each shard, which nothing precedes."""
    tokenizer = corpus.tokenizer()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    records = corpus.records("tr/help")
    for i in range(len(records)):
        np.add.at(counts, records[i][1:], 1)
    counts[tokenizer.pad_id] = 0
    counts[tokenizer.bos_id] += len(corpus.sources["tr/help"].shards)
    np.testing.assert_array_equal(counts, corpus.token_counts("tr/help"))


def test_cursors_restart_where_the_transition_says_so(config, corpus):
    second = dataclasses.replace(
        config.stages[1], transition=TransitionConfig(cursors="restart")
    )
    cfg = dataclasses.replace(config, stages=(config.stages[0], second))
    going_on, again = make_data_plan(config, corpus), make_data_plan(cfg, corpus)
    assert len(again.runs) == 2
    assert again.consumed(7) == going_on.consumed(7)
    before = going_on.consumed(7)
    after_on, after_again = going_on.consumed(13), again.consumed(13)
    served = again.served(13)
    for name in before:
        assert after_again[name] == served[name] - before[name]
        assert after_on[name] >= before[name]
    assert sum(served.values()) == 13 * 8


@pytest.fixture
def three_runs(config):
    """Stages of 7, 6 and 4 steps; the second and the third begin their data anew."""
    first, second = config.stages
    ramped = dataclasses.replace(second, transition=TransitionConfig(cursors="restart"))
    third = dataclasses.replace(
        ramped, name="third", tokens=4 * 8 * 64, mixture=first.mixture
    )
    return dataclasses.replace(config, stages=(first, ramped, third))


def test_what_is_counted_per_segment_at_every_step(three_runs, corpus):
    """Against the examples themselves, before, at and after each boundary."""
    plan = make_data_plan(three_runs, corpus)
    assert [s.first_example for s in plan.runs] == [0, 56, 104]
    assert len({r.curriculum.seed for r in plan.runs}) == 3
    dataset, _ = plan.lookup(np.arange(17 * 8))
    names = len(plan.sources)
    for step in range(18):
        end = step * 8
        per = np.bincount(dataset[:end], minlength=3 * names).reshape(3, names)
        current = max(k for k in range(3) if k == 0 or (0, 56, 104)[k] < end)
        assert [plan.served_of(k, step) for k in range(3)] == per.sum(1).tolist()
        assert list(plan.served(step).values()) == per.sum(0).tolist()
        assert plan.run_before(step) == current
        assert list(plan.consumed(step).values()) == per[current].tolist()
        assert [past["fingerprint"] for past in plan.curricula(step)] == [
            fingerprint(s.curriculum, int(n))
            for s, n in zip(plan.runs, per.sum(1), strict=True)
        ]
    # A ramp into a segment begins at the shares of the stage before it.
    assert plan.runs[1].curriculum.before == plan.shares[0]
    rows = [r for r in plan.table() if r["source"] == "tr/help"]
    assert rows[-1]["epochs_total"] == pytest.approx(sum(r["epochs"] for r in rows))


def test_a_restart_after_another_run_has_an_order_of_its_own(three_runs, corpus):
    """Also where both runs have the same seed and begin anew."""
    former = make_data_plan(three_runs, corpus)
    origin = {"cursors": {}, "seed": former.runs[0].curriculum.seed, "shares": {}}
    stages = (
        dataclasses.replace(
            three_runs.stages[0], transition=TransitionConfig(cursors="restart")
        ),
        *three_runs.stages[1:],
    )
    plan = make_data_plan(
        dataclasses.replace(three_runs, stages=stages), corpus, origin
    )
    seeds = [origin["seed"], *(r.curriculum.seed for r in plan.runs)]
    assert len(set(seeds)) == 4


@pytest.fixture
def two_domains(config, corpus):
    """The corpus with en/hq beside en/help, and a config that names one of them."""
    info = dataclasses.replace(corpus.sources["en/help"], name="en/hq", domain="hq")
    sources = {**corpus.sources, "en/hq": info}
    mixture = MixtureConfig("natural", {"en/hq": 0.5})
    stage = dataclasses.replace(config.stages[0], mixture=mixture)
    cfg = dataclasses.replace(config, stages=(stage,))
    return cfg, dataclasses.replace(corpus, sources=sources)


def test_what_a_config_may_not_mean_is_said(two_domains, config, corpus):
    cfg, other = two_domains
    plan = make_data_plan(cfg, other)
    assert plan.language_shares(cfg, 0)["en"] == pytest.approx(0.5)
    (text,) = mixture_notes(cfg, other, plan)
    assert "stages.align.mixture.shares names 'en'" in text
    assert "get nothing" in text
    assert text.endswith("en/help")
    former = make_data_plan(cfg, other, rest_of="sources")
    assert former.shares[0]["en/help"] > 0.1
    (text,) = mixture_notes(cfg, other, former)
    assert f"have {former.shares[0]['en/help']:.2%} of the rest" in text
    mixture = MixtureConfig("natural", {"en/hq": 0.5, "en/help": 0.0})
    stage = dataclasses.replace(cfg.stages[0], mixture=mixture)
    plain = dataclasses.replace(cfg, stages=(stage,))
    assert mixture_notes(plain, other, make_data_plan(plain, other)) == []
    assert mixture_notes(config, corpus, make_data_plan(config, corpus)) == []
    weights = TokenWeightConfig("target_share", {"en": 0.8, "ru": 0.6, "tr": 0.4})
    stage = dataclasses.replace(config.stages[0], token_weights=weights)
    weighted = dataclasses.replace(config, stages=(stage,))
    (text,) = mixture_notes(weighted, corpus, make_data_plan(weighted, corpus))
    assert "stages.align.token_weights.weights sum to 1.8" in text


def test_a_ramp_that_is_too_long_is_told_in_tokens(config, corpus, replace):
    second = replace(config.stages[1], "mixture.ramp_tokens", 7 * 8 * 64)
    cfg = dataclasses.replace(config, stages=(config.stages[0], second))
    want = r"^stages.enrich.mixture.ramp_tokens=3584 exceeds the stage's tokens=3072:"
    with pytest.raises(UserError, match=want):
        make_data_plan(cfg, corpus)
    long = replace(config.stages[0], "tokens", 2**40)
    cfg = dataclasses.replace(config, stages=(long,))
    with pytest.raises(UserError, match=rf"^stages.align.tokens={2**40} is more than"):
        make_data_plan(cfg, corpus)


def past_error(former, cfg, corpus, step):
    with pytest.raises(UserError) as e:
        check_past(
            cfg, make_data_plan(cfg, corpus), corpus, meta_of(former, corpus, step), "x"
        )
    return str(e.value)


def test_a_changed_past_is_told_by_its_fields_first(config, three_runs, corpus):
    """As they are written in the config; not by what follows from them."""
    first, second = config.stages

    def changed(path, value, cfg=config):
        stages = [set_in(cfg.stages[0], path, value), *cfg.stages[1:]]
        return dataclasses.replace(cfg, stages=tuple(stages))

    def set_in(obj, path, value):
        name, _, rest = path.partition(".")
        new = set_in(getattr(obj, name), rest, value) if rest else value
        return dataclasses.replace(obj, **{name: new})

    longer = past_error(config, changed("tokens", 8 * 8 * 64), corpus, 9)
    assert longer.startswith("stages.align.tokens was 3584 and is 4096: what was")
    assert "order of sources" not in longer
    assert "examples were served" not in longer
    shares = {"en/help": 0.9, "ru/help": 0.1}
    other = past_error(config, changed("mixture.shares", shares), corpus, 3)
    assert other.startswith("stages.align.mixture.shares.en/help was 0.4 and is 0.9; ")
    # Where cursors begin anew, in both directions.
    again = dataclasses.replace(second, transition=TransitionConfig(cursors="restart"))
    restart = dataclasses.replace(config, stages=(first, again))
    on = dataclasses.replace(
        config,
        stages=(first, dataclasses.replace(second, transition=TransitionConfig())),
    )
    want = "stages.enrich.transition.cursors was 'continue' and is 'restart': "
    assert past_error(on, restart, corpus, 9).startswith(want)
    want = "stages.enrich.transition.cursors was 'restart' and is 'continue': "
    assert past_error(restart, on, corpus, 9).startswith(want)
    check_past(
        restart, make_data_plan(restart, corpus), corpus, meta_of(on, corpus, 7), "x"
    )
    shorter = dataclasses.replace(three_runs, stages=three_runs.stages[:2])
    want = "stages.third is not in the config any more: "
    assert past_error(three_runs, shorter, corpus, 15).startswith(want)
    blocks = dataclasses.replace(
        config, data=dataclasses.replace(config.data, block_examples=16)
    )
    want = "data.block_examples was 32 and is 16: "
    assert past_error(config, blocks, corpus, 9).startswith(want)
    # The config is the same, the corpus is not.
    cut = with_other_shards(corpus, "en/help", [], cut=1)
    records = sum(r["records"] for r in cut.manifest["sources"]["en/help"]["shards"])
    info = dataclasses.replace(corpus.sources["en/help"], records=records)
    cut = dataclasses.replace(cut, sources={**corpus.sources, "en/help": info})
    with pytest.raises(UserError, match=rf"^size of en/help was \d+ and is {records}"):
        check_past(
            config, make_data_plan(config, cut), cut, meta_of(config, corpus, 9), "x"
        )


def test_rows_of_this_host_cover_the_batch():
    mesh = jax.make_mesh(
        (2, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    rows = sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(host_rows(8, rows), np.arange(8))
    values = np.arange(16, dtype=np.int32).reshape(8, 2)
    made = loader.global_batch({"x": values}, np.arange(8), 8, rows)["x"]
    np.testing.assert_array_equal(made, values)
    assert made.sharding.is_equivalent_to(rows, 2)


def test_a_language_that_the_config_lacks(config, corpus):
    cfg = dataclasses.replace(config, languages=("en", "ru"))
    with pytest.raises(UserError, match="'tr/help' in language 'tr'"):
        make_data_plan(cfg, corpus)


def test_a_seq_len_that_does_not_divide(config, corpus, replace):
    with pytest.raises(UserError, match="divide"):
        make_data_plan(replace(config, "data.seq_len", 48), corpus)


def meta_of(cfg, corpus, step, rollbacks=(), origin=None):
    """What a checkpoint says of the past."""
    return RunMeta(
        step=step,
        config=cfg,
        curricula=make_data_plan(cfg, corpus, origin, rollbacks).curricula(step),
        rollbacks=list(rollbacks),
        contents=corpus.contents(),
        origin=origin,
        tokenizer=corpus.manifest["tokenizer"]["fingerprint"],
        lineage={"corpus": {"recipe": corpus.manifest["recipe"]}},
    )


def with_other_shards(corpus, source, numbers, cut=0):
    """The same corpus with other hashes of some shards, or some of them left out."""
    manifest = copy.deepcopy(corpus.manifest)
    shards = manifest["sources"][source]["shards"]
    for number in numbers:
        shards[number]["sha256"] = "0" * 64
    del shards[len(shards) - cut :]
    return dataclasses.replace(corpus, manifest=manifest)


@pytest.mark.parametrize("step", [3, 7, 12, 15])
def test_what_was_served_of_a_changed_shard_is_counted(three_runs, corpus, step):
    """Against the rows that were read: with segments, and examples left out."""
    left_out = Skipped(1, "en/help", 3, 5)
    rollbacks = [{"skipped": [dataclasses.asdict(left_out)]}]
    plan = make_data_plan(three_runs, corpus, None, rollbacks)
    records = corpus.records("en/help")
    files = [row["file"] for row in corpus.manifest["sources"]["en/help"]["shards"]]
    assert len(files) > 1
    served = np.zeros(len(files), int)
    number = plan.sources.index("en/help")
    for dataset, position in zip(*plan.lookup(np.arange(step * 8)), strict=True):
        segment, source = divmod(int(dataset), len(plan.sources))
        if source == number:
            seed = plan.runs[segment].curriculum.seed
            order = loader.example_order(seed, "en/help", records, 1)
            shard, _ = records.locate(order[int(position)])
            served[[shard.endswith(f) for f in files].index(True)] += 1
    meta = meta_of(three_runs, corpus, step, rollbacks)
    assert corpus_changes(meta, corpus, "here") == []
    for k, count in enumerate(served.tolist()):
        other = with_other_shards(corpus, "en/help", [k])
        (change,) = corpus_changes(meta, other, "here")
        assert change.served == bool(count)
        said = f"shards changed ({k}), with {count} of the {served.sum()} examples"
        assert said in change.text


def test_a_source_that_grows_under_a_cursor_is_refused(config, corpus):
    """One of a former run too, before this one has served any of the source."""
    origin = {"cursors": {"ru/help": 5}, "seed": 3, "shares": {}}
    mixture = MixtureConfig("explicit", {"en/help": 1.0})
    stage = dataclasses.replace(config.stages[0], mixture=mixture)
    cfg = dataclasses.replace(config, stages=(stage,))
    for cursors, refused in ((origin, True), (None, False)):
        meta = meta_of(cfg, corpus, 3, origin=cursors)
        other = with_other_shards(corpus, "ru/help", [])
        other.manifest["sources"]["ru/help"]["shards"].append(
            {"records": 2, "sha256": "1" * 64}
        )
        (change,) = corpus_changes(meta, other, "here")
        assert "source ru/help had" in change.text
        assert change.served == refused


def test_texts_that_were_not_served_may_change(three_runs, corpus):
    first = three_runs.stages[0]
    mixture = MixtureConfig("explicit", {"en/help": 1.0})
    stages = (dataclasses.replace(first, mixture=mixture), *three_runs.stages[1:])
    cfg = dataclasses.replace(three_runs, stages=stages)
    meta = meta_of(cfg, corpus, 7)
    other = with_other_shards(corpus, "ru/help", [0])
    other.manifest["recipe"] = "another"
    other.manifest["heldout"]["udhr"]["languages"]["tr"]["sha256"] = "0" * 64
    check_contents(meta, other, "here")
    texts = [c.text for c in corpus_changes(meta, other, "here")]
    assert [t.split()[:3] for t in texts] == [
        ["its", "recipe", "was"],
        ["source", "ru/help:", "1"],
        ["held-out", "set", "udhr"],
    ]
    assert "with 0 of the 0 examples served" in texts[1]
    with pytest.raises(UserError, match=r"other texts than here .* en/help: 1 of"):
        check_contents(meta, with_other_shards(corpus, "en/help", [0]), "here")
    # After the boundary the next stage's sources were served too.
    with pytest.raises(UserError, match=r"source ru/help: 1 of its"):
        check_contents(meta_of(cfg, corpus, 13), other, "here")
    shorter = with_other_shards(corpus, "ru/help", [], cut=1)
    (change,) = corpus_changes(meta, shorter, "here")
    assert "1 of its 3 shards changed (2), its records from" in change.text
    assert not change.served
