"""Counts are exact, the past is fixed, and everything is random access."""

import dataclasses
import json
import pickle
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import DataConfig, UserError, load_config
from gamayun_jax.data import curriculum as cu
from gamayun_jax.data import mixture
from gamayun_jax.data.continuity import diff_past, fingerprint
from gamayun_jax.data.plan import CurriculumRun, check_epochs

SETTINGS = settings(max_examples=60, deadline=None)
ORDERS = ("interleaved", "shuffled")


@st.composite
def curricula(
    draw,
    max_sources=6,
    ramps=("step", "linear", "cosine"),
    orders=("interleaved",),
):
    count = draw(st.integers(1, max_sources))
    names = [f"l{i}/d" for i in range(count)]
    phases = []
    for k in range(draw(st.integers(1, 3))):
        # Weights of 0, tiny ones and equal ones are the hard cases.
        raw = draw(
            st.lists(
                st.sampled_from([0.0, 0.0, 1e-4, 0.5, 1.0, 1.0, 3.0]),
                min_size=count,
                max_size=count,
            ).filter(any)
        )
        total = sum(raw)
        examples = draw(st.integers(1, 300))
        ramp = draw(st.sampled_from(ramps))
        phases.append(
            cu.Phase(
                f"p{k}",
                examples,
                {n: w / total for n, w in zip(names, raw, strict=True)},
                ramp,
                draw(st.integers(0, examples)),
                draw(st.sampled_from(orders)),
            )
        )
    sizes = {n: draw(st.integers(1, 50)) for n in names}
    block = draw(st.sampled_from([1, 2, 7, 32]))
    start = {n: draw(st.integers(0, 9)) for n in names[:2]}
    return cu.Curriculum(tuple(phases), sizes, draw(st.integers(0, 9)), block, start)


@SETTINGS
@given(curricula(orders=ORDERS))
def test_counts_positions_and_random_access(c):
    source, position = c.lookup(np.arange(c.total))
    S = len(c.names)
    running = c.offsets.copy()
    for i, (s, p) in enumerate(zip(source, position, strict=True)):
        assert p == running[s]  # no gap, no repeat, never back
        np.testing.assert_array_equal(c.counts_at(i), running - c.offsets)
        running[s] += 1
    assert c.counts_at(c.total).sum() == c.total
    assert source.min() >= 0
    assert source.max() < S
    order = np.random.default_rng(0).permutation(c.total)
    again = pickle.loads(pickle.dumps(c)).lookup(order)
    np.testing.assert_array_equal(again[0], source[order])
    np.testing.assert_array_equal(again[1], position[order])
    last = c.lookup(np.array([c.total - 1]))
    assert (last[0][0], last[1][0]) == (source[-1], position[-1])


@SETTINGS
@given(curricula(ramps=("step",)))
def test_counts_are_within_one_of_the_integral_at_block_boundaries(c):
    first = 0
    for phase in c.phases:
        weights = np.array([phase.weights.get(n, 0.0) for n in c.names])
        whole = cu.to_fixed_point(weights / weights.sum())
        assert whole.sum() == cu.ONE
        before = c.counts_at(first)
        for done in {*range(0, phase.examples, c.block_examples), phase.examples}:
            counts = c.counts_at(first + done) - before
            for n, w in zip(counts.tolist(), whole.tolist(), strict=True):
                assert abs(n - Fraction(w * done, cu.ONE)) < 1
                assert w or not n
        first += phase.examples


@SETTINGS
@given(curricula(max_sources=24, ramps=("linear",)))
def test_linear_ramps_keep_the_bound_in_exact_fractions(c):
    """Weights are rounded to 2**-30, so a phase of n may be off by n * 2**-30 more."""
    former, first = None, 0
    for phase in c.phases:
        final = [Fraction(phase.weights.get(n, 0.0)) for n in c.names]
        before, ramp = c.counts_at(first), phase.ramp_examples
        for done in {*range(0, phase.examples, c.block_examples), phase.examples}:
            new = Fraction(done)  # integral of the share of the new weights
            if former is not None and ramp:
                new = Fraction(min(done, ramp) ** 2, 2 * ramp) + max(done - ramp, 0)
            counts = (c.counts_at(first + done) - before).tolist()
            for n, a, b in zip(counts, former or final, final, strict=True):
                assert abs(n - (done - new) * a - new * b) < 1 + Fraction(done, 2**29)
                assert n == 0 or a or b
        former, first = final, first + phase.examples


@SETTINGS
@given(
    st.lists(st.integers(0, 2**30), min_size=1, max_size=24).filter(any),
    st.floats(1e-12, 1),
)
def test_quantised_weights_sum_exactly_and_are_within_one_unit(raw, tiny):
    weights = np.array(raw, np.float64)
    weights[0] *= tiny
    weights /= weights.sum() or 1.0
    if not weights.any():
        return
    whole = cu.to_fixed_point(weights)
    assert whole.sum() == cu.ONE
    assert np.abs(whole - weights * cu.ONE).max() <= 1
    assert not whole[weights == 0].any()


@SETTINGS
@given(curricula())
def test_ramped_counts_follow_the_integral_of_the_ramp(c):
    former, first = None, 0
    for phase in c.phases:
        final = np.array([phase.weights.get(n, 0.0) for n in c.names])
        before = c.counts_at(first)
        for done in {*range(0, phase.examples, c.block_examples), phase.examples}:
            x = (np.arange(4000) + 0.5) / 4000 * done
            t = np.clip(x / max(phase.ramp_examples, 1e-9), 0, 1)
            if phase.ramp == "step" or former is None or not phase.ramp_examples:
                t = np.ones_like(t)
            elif phase.ramp == "cosine":
                t = (1 - np.cos(np.pi * t)) / 2
            old = final if former is None else former
            integral = done * ((1 - t)[:, None] * old + t[:, None] * final).mean(0)
            counts = c.counts_at(first + done) - before
            assert np.abs(counts - integral).max() < 1 + 1e-4
        former, first = final, first + phase.examples


def test_a_ramp_can_start_from_a_former_run():
    sizes = dict.fromkeys(("a/x", "b/x"), 9)
    phase = cu.Phase("p", 100, {"a/x": 0.0, "b/x": 1.0}, "linear", 100)
    alone = cu.Curriculum((phase,), sizes, block_examples=10)
    after = cu.Curriculum((phase,), sizes, 0, 10, {}, {"a/x": 1.0})
    np.testing.assert_array_equal(alone.counts_at(100), [0, 100])
    np.testing.assert_array_equal(after.counts_at(100), [50, 50])
    assert after.counts_at(20)[0] == 18


def test_a_source_leaves_and_returns_with_its_cursor():
    on, off = {"a/x": 0.5, "b/x": 0.5}, {"a/x": 0.0, "b/x": 1.0}
    phases = tuple(cu.Phase(str(i), 100, w) for i, w in enumerate((on, off, on)))
    c = cu.Curriculum(phases, {"a/x": 1000, "b/x": 1000}, block_examples=16)
    source, position = c.lookup(np.arange(300))
    assert not (source[100:200] == 0).any()
    np.testing.assert_array_equal(position[source == 0], np.arange(100))


@SETTINGS
@given(curricula(orders=ORDERS), st.data())
def test_the_past_does_not_depend_on_the_future(c, data):
    at = data.draw(st.integers(0, c.total))
    longer = cu.Curriculum(
        (*c.phases, cu.Phase("new", 50, c.phases[0].weights)),
        c.sources, c.seed, c.block_examples, c.start,
    )  # fmt: skip
    assert diff_past(c, longer, at) == []
    np.testing.assert_array_equal(
        c.lookup(np.arange(c.total)), longer.lookup(np.arange(c.total))
    )
    again = cu.Curriculum.from_json(c.to_json())
    assert fingerprint(again, at) == fingerprint(c, at)


@SETTINGS
@given(curricula(), st.data())
def test_prolonging_the_last_phase_keeps_its_whole_blocks(c, data):
    *former, last = c.phases
    # Past its ramp, that is: in a short last block the ramp has another mean.
    whole = last.examples // c.block_examples * c.block_examples
    last = dataclasses.replace(last, ramp_examples=min(last.ramp_examples, whole))
    more = data.draw(st.integers(1, 200))
    longer = dataclasses.replace(last, examples=last.examples + more)
    old = dataclasses.replace(c, phases=(*former, last))
    new = dataclasses.replace(c, phases=(*former, longer))
    served = c.total - last.examples + whole
    np.testing.assert_array_equal(
        old.lookup(np.arange(served)), new.lookup(np.arange(served))
    )
    assert diff_past(old, new, served) == []


@SETTINGS
@given(curricula(orders=ORDERS), st.data())
def test_future_phases_may_change_and_sources_may_come(c, data):
    kept = data.draw(st.integers(0, len(c.phases)))
    at = data.draw(st.integers(0, sum(p.examples for p in c.phases[:kept])))
    new = cu.Phase("another", c.total + 1, {"new/d": 1.0}, "cosine", 1)
    # A newcomer goes anywhere among the sources; names of phases mean nothing.
    names = list(c.names)
    names.insert(data.draw(st.integers(0, len(names))), "new/d")
    edited = dataclasses.replace(
        c,
        phases=(*(dataclasses.replace(p, name="x") for p in c.phases[:kept]), new),
        sources={n: c.sources.get(n, 5) for n in names},
        start={**c.start, "new/d": 3},
    )
    assert fingerprint(edited, at) == fingerprint(c, at)
    assert diff_past(c, edited, at) == []
    source, position = c.lookup(np.arange(at))
    again = edited.lookup(np.arange(at))
    assert [c.names[s] for s in source] == [edited.names[s] for s in again[0]]
    np.testing.assert_array_equal(position, again[1])


@SETTINGS
@given(
    curricula(orders=ORDERS),
    curricula(orders=ORDERS),
    st.sampled_from(["phases", "sources", "seed", "start"]),
)
def test_a_different_past_is_always_noticed(c, other, field):
    """No equal fingerprints without equal examples; the diff names where they part."""
    if field in ("phases", "sources"):
        c, other = (
            dataclasses.replace(x, sources={f"l{i}/d": 9 for i in range(6)})
            for x in (c, other)
        )
    if field == "sources":
        new = dataclasses.replace(c, sources=dict.fromkeys(c.sources, 8))
    else:
        value = getattr(other, field)
        if field == "start":
            value = {n: v for n, v in value.items() if n in c.sources}
        new = dataclasses.replace(c, **{field: value})
    end = min(c.total, new.total)
    was, would = (x.lookup(np.arange(end)) for x in (c, new))
    parts = (was[0] != would[0]) | (was[1] != would[1])
    first = int(np.argmax(parts)) if parts.any() else end
    lines = diff_past(c, new, end)
    assert bool(lines) == (fingerprint(c, end) != fingerprint(new, end))
    if parts.any() or field == "sources":
        assert len(lines) >= 2 or field == "phases", lines
        named = int(lines[0].split("number ")[1].split(" ")[0])
        assert named <= first
        assert diff_past(c, new, named) == []


def test_a_changed_past_is_named():
    weights = {"a/x": 0.5, "b/x": 0.5}
    sizes = {"a/x": 100, "b/x": 100}
    later = cu.Phase("later", 50, weights)
    old = cu.Curriculum((cu.Phase("p", 1000, weights), later), sizes, 0, 64)
    changed = cu.Phase("p", 1000, {"a/x": 0.6, "b/x": 0.4})
    new = dataclasses.replace(
        old, phases=(changed, dataclasses.replace(later, weights={"b/x": 1.0}))
    )
    text = " ".join(diff_past(old, new, 500))
    assert "share of a/x in p was 0.5 and is 0.6" in text
    was, would = old.counts_at(500)[0], new.counts_at(500)[0]
    assert f"a/x: {was} examples were served, {would} would have been" in text
    assert "later" not in text  # is in the future, and no reason
    assert diff_past(old, new, 0) == []
    grown = dataclasses.replace(old, sources={"a/x": 101, "b/x": 100})
    assert "size of a/x was 100 and is 101" in " ".join(diff_past(old, grown, 10))
    turned = dataclasses.replace(old, sources={"b/x": 100, "a/x": 100})
    assert "order of sources" in " ".join(diff_past(old, turned, 10))
    short = dataclasses.replace(old, phases=(cu.Phase("p", 100, weights),))
    assert "ends at example 100" in diff_past(old, short, 500)[0]


def test_another_version_of_the_mapping_is_refused():
    c = cu.Curriculum((cu.Phase("p", 10, {"a/x": 1.0}),), {"a/x": 5})
    data = json.loads(json.dumps(c.to_json()))
    assert cu.Curriculum.from_json(data) == c
    for old in (
        {**data, "version": cu.VERSION - 1},
        data | {"version": cu.VERSION + 1},
    ):
        with pytest.raises(UserError, match="version"):
            cu.Curriculum.from_json(old)
    del data["version"]  # checkpoints from before it was written down
    with pytest.raises(UserError, match="mapping version 1"):
        cu.Curriculum.from_json(data)


def test_any_part_of_a_block_is_near_the_weights():
    weights = {"a/x": 0.6, "b/x": 0.3, "c/x": 0.1}
    c = cu.Curriculum((cu.Phase("p", 4096, weights),), dict.fromkeys(weights, 9), 3)
    for n in range(1, 4096, 37):
        assert np.abs(c.counts_at(n) - n * np.array([0.6, 0.3, 0.1])).max() <= 2


def test_starts_in_a_second_at_full_scale():
    """2.5T tokens in examples of 4096, 24 sources; slack of 5 for slow machines."""
    rng = np.random.default_rng(0)
    sizes = {f"l{i}/web": 10**7 for i in range(24)}

    def weights():
        w = rng.random(24)
        return dict(zip(sizes, (w / w.sum()).tolist(), strict=True))

    phases = (
        cu.Phase("align", 488_000_000, weights()),
        cu.Phase("enrich", 122_000_000, weights(), "cosine", 12_000_000),
    )
    begin = time.process_time()
    c = cu.Curriculum(phases, sizes, 0, 16_384)
    c.counts_at(c.total)
    assert time.process_time() - begin < 5
    cu.phase_counts.cache_clear()
    tracemalloc.start()
    cu.Curriculum(phases, sizes, 0, 16_384).counts_at(10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    batch = np.arange(10**6, 10**6 + 512)
    c.lookup(batch)
    begin = time.process_time()
    for _ in range(20):
        c.lookup(batch)
    assert time.process_time() - begin < 20 * 0.005  # far below 1 ms where idle


def one_block_after_another(weights, lengths, final):
    """Earliest deadline first as it is defined: deadlines in exact fractions, blocks in
    turn. `earliest_deadline_counts` must give the same counts."""
    integral = np.cumsum(weights * lengths[:, None], axis=0)
    now = np.zeros(weights.shape[1], np.int64)
    counts = [now.tolist()]
    for b, total in enumerate(np.cumsum(lengths).tolist()):
        now = np.maximum(now, integral[b] >> 30)
        late = []
        for s in range(len(now)):
            need = int((integral[b, s] >> 30) + 1) << 30
            if -(-integral[b, s] >> 30) <= now[s]:
                continue  # ahead already, or at a whole number
            k = int(np.searchsorted(integral[:, s], need))
            rate = int(weights[k, s] if k < len(weights) else final[s])
            start = int(lengths[:k].sum())
            done = int(integral[k - 1, s]) if k else 0
            due = start + Fraction(need - done, rate) if rate else cu.NEVER
            late.append((-(-due // 1), s))
        for _, s in sorted(late)[: int(total - now.sum())]:
            now[s] += 1
        counts.append(now.tolist())
    return np.array(counts)


@pytest.mark.parametrize("part", [1, 3, 10, 1 << 14])  # of the blocks, at a time
@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_counts_are_those_of_one_block_after_another(length, part, monkeypatch):
    monkeypatch.setattr(cu, "PART", part)
    rng = np.random.default_rng(length)
    for trial in range(12):
        sources, blocks = int(rng.integers(1, 20)), int(rng.integers(2, 60))
        lengths = np.full(blocks, length)
        lengths[-1] = rng.integers(1, length + 1)
        ends = rng.dirichlet(np.full(sources, 0.3), 2)
        if trial % 3 == 0:
            ends[:] = 1 / sources  # ties
        ends[:, rng.random(sources) < 0.2] = 0
        ends[:, 0] += ends.sum(1) == 0
        ends /= ends.sum(1, keepdims=True)
        done = np.clip(np.arange(blocks) / rng.integers(1, blocks), 0, 1)[:, None]
        weights = cu.to_fixed_point((1 - done) * ends[0] + done * ends[1])
        rule = weights, lengths, cu.to_fixed_point(ends[1])
        assert (
            cu.earliest_deadline_counts(*rule) == one_block_after_another(*rule)
        ).all()


def test_small_blocks_start_soon_too_and_are_planned_once(monkeypatch):
    """500B tokens in blocks of the default size: 4 s of a processor once."""
    names = [f"l{i}/web" for i in range(27)]
    w = np.random.default_rng(0).dirichlet(np.full(27, 2.0)).tolist()
    phases = (cu.Phase("align", 122_000_000, dict(zip(names, w, strict=True))),)
    sizes = dict.fromkeys(names, 10**7)
    begin = time.process_time()
    first = cu.Curriculum(phases, sizes).counts_at(10**6)
    assert time.process_time() - begin < 2
    monkeypatch.setattr(cu, "earliest_deadline_counts", None)
    again = cu.Curriculum(phases, sizes, seed=0).counts_at(10**6)
    assert (again == first).all()


SIZES = {"en/web": 800, "en/hq": 200, "ru/web": 100, "tr/web": 10}


def shares(scheme, given=None, **kw):
    args = {"alpha": 0.3, "max_epochs": 4.0, "budget": 100} | kw
    return mixture.mixture_shares(SIZES, scheme, given or {}, **args)


def test_natural_and_temperature_limits():
    natural = shares("natural")
    assert natural["ru/web"] == pytest.approx(100 / 1110)
    assert shares("temperature", alpha=1.0) == pytest.approx(natural)
    flat = shares("temperature", alpha=0.0)
    assert flat["ru/web"] == pytest.approx(1 / 3)
    assert flat["en/web"] == pytest.approx(4 / 15)  # by size inside a language


def test_unimax_caps_the_small_and_levels_the_rest():
    found = shares("unimax", max_epochs=2.0, budget=600)
    assert found["tr/web"] * 600 == pytest.approx(20)  # capped at two epochs
    assert found["ru/web"] * 600 == pytest.approx(200)  # capped too
    assert (found["en/web"] + found["en/hq"]) * 600 == pytest.approx(380)
    with pytest.raises(UserError, match="max_epochs"):
        shares("unimax", max_epochs=1.0, budget=10_000)


@SETTINGS
@given(
    st.dictionaries(
        st.sampled_from([f"l{i}" for i in range(12)]),
        st.integers(1, 10**12),
        min_size=1,
    ),
    st.floats(0.1, 8),
    st.floats(0.001, 0.999),
)
def test_unimax_is_water_filling(sizes, cap, part):
    """The reference: one level for all, cut off at each one's cap, by bisection."""
    budget = part * cap * sum(sizes.values())
    found = mixture.unimax(sizes, cap, budget)
    low, high = 0.0, budget
    for _ in range(200):
        level = (low + high) / 2
        full = sum(min(level, cap * n) for n in sizes.values())
        low, high = (level, high) if full < budget else (low, level)
    for name, n in sizes.items():
        assert found[name] == pytest.approx(min(high, cap * n), rel=1e-6)


@SETTINGS
@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")).map("/".join),
        st.integers(1, 10**12),
        min_size=1,
    ),
    st.floats(0, 50),
    st.floats(0, 1),
)
def test_temperature_keeps_domains_natural_and_shares_exact(sizes, alpha, share):
    name = next(iter(sizes))
    free = [n for n in sizes if n[0] != name[0]]
    given_shares = {name: share if free else 1.0}
    found = mixture.mixture_shares(sizes, "temperature", given_shares, alpha, 4.0, 100)
    assert sum(found.values()) == pytest.approx(1)
    if share < 1 - 1e-5:
        assert found[name] == pytest.approx(given_shares[name], rel=1e-9, abs=1e-12)
    assert sum(found[n] for n in sizes if n[0] == name[0]) == found[name]
    totals = {}
    for n in free:
        totals[n[0]] = totals.get(n[0], 0) + sizes[n]
    for a in free:
        for b in free:
            if a[0] == b[0]:
                assert found[a] * sizes[b] == pytest.approx(found[b] * sizes[a])
            elif found[a] > 1e-200 and found[b] > 1e-200:
                logs = [np.log(found[n] / sizes[n] * totals[n[0]]) for n in (a, b)]
                ratio = alpha * np.log(totals[a[0]] / totals[b[0]])
                assert logs[0] - logs[1] == pytest.approx(ratio, rel=1e-6, abs=1e-6)


def test_given_shares_are_exact_and_the_rest_is_divided():
    found = shares("natural", {"en/*": 0.3, "en/hq": 0.1})
    assert found["en/hq"] == pytest.approx(0.1)
    assert found["en/web"] == pytest.approx(0.3)
    assert found["ru/web"] == pytest.approx(0.6 * 100 / 110)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("scheme", ["natural", "temperature", "unimax"])
def test_a_language_that_is_named_has_exactly_what_is_named(scheme):
    """Whatever other sources it has; a glob over languages names none."""
    found = shares(scheme, {"en/hq": 0.3})
    assert (found["en/hq"], found["en/web"]) == (pytest.approx(0.3), 0)
    assert found["ru/web"] + found["tr/web"] == pytest.approx(0.7)
    everywhere = shares(scheme, {"*/hq": 0.3})
    assert everywhere["en/hq"] == pytest.approx(0.3)
    assert everywhere["en/web"] > 0
    # As a run that a former release began keeps it: en/web is one of the rest.
    former = shares(scheme, {"en/hq": 0.3}, rest_of="sources")
    assert former == pytest.approx(everywhere)
    three = {"en/hq": 0.3, "ru/web": 0.1, "tr/*": 0.1}
    with pytest.raises(UserError, match="left for the rest; give a share to en/web"):
        shares(scheme, three)


@pytest.mark.parametrize(
    ("scheme", "given_shares", "message"),
    [
        ("natural", {"xx/web": 0.1}, "matches no source"),
        ("natural", {"en/*": 0.1, "*/hq": 0.1}, "both match 'en/hq'"),
        ("explicit", {"en/*": 0.5}, "sum to 0.5"),
        ("natural", {"en/*": 1.5}, "more than 1"),
        ("natural", {"en/*": 0.5, "ru/*": 0.500002}, "to 1.000002, which is more"),
    ],
)
def test_bad_shares(scheme, given_shares, message):
    with pytest.raises(UserError, match=message):
        shares(scheme, given_shares)


def test_epoch_caps():
    c = cu.Curriculum((cu.Phase("p", 100, {"a/x": 1.0}),), {"a/x": 30})

    def check(caps):
        check_epochs(DataConfig(max_epochs_of=caps), [CurriculumRun(0, c)])

    check({"a/x": 4})
    with pytest.raises(UserError, match=r"'a/x' would be seen 3.33 times"):
        check({"a/x": 3})
    with pytest.raises(UserError, match="did you mean 'a/x'"):
        check({"a/y": 3})


@pytest.mark.parametrize("path", sorted(Path("experiments").glob("*.py")), ids=str)
def test_shipped_configs_name_every_source_of_a_language_they_name(path):
    """So each language's total is what is written, in former releases as now."""
    cfg = load_config(path)
    sizes = {s.name: 1 for s in cfg.corpus.sources}
    for stage in cfg.stages:
        assert mixture.unnamed_sources(sizes, stage.mixture.shares) == {}
