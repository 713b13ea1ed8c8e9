"""Counts are exact, the past is fixed, and everything is random access."""

import pickle
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax import curriculum as cu
from gamayun_jax.config import UserError, language_domain

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def curricula(draw, max_sources=6, ramps=cu.RAMPS):
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
            )
        )
    sizes = {n: draw(st.integers(1, 50)) for n in names}
    block = draw(st.sampled_from([1, 2, 7, 32]))
    start = {n: draw(st.integers(0, 9)) for n in names[:2]}
    return cu.Curriculum(tuple(phases), sizes, draw(st.integers(0, 9)), block, start)


@SETTINGS
@given(curricula())
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
    assert c[c.total - 1] == (source[-1], position[-1])


@SETTINGS
@given(curricula(ramps=("step",)))
def test_counts_are_within_one_of_the_integral_at_block_boundaries(c):
    first = 0
    for phase in c.phases:
        weights = np.array([phase.weights.get(n, 0.0) for n in c.names])
        whole = cu.quantise(weights / weights.sum())
        assert whole.sum() == cu.ONE
        before = c.counts_at(first)
        for done in {*range(0, phase.examples, c.block_examples), phase.examples}:
            counts = c.counts_at(first + done) - before
            for n, w in zip(counts.tolist(), whole.tolist(), strict=True):
                assert abs(n - Fraction(w * done, cu.ONE)) < 1
                assert w or not n
        first += phase.examples


@SETTINGS
@given(curricula())
def test_ramped_counts_follow_the_integral_of_the_ramp(c):
    former, first = None, 0
    for phase in c.phases:
        final = np.array([phase.weights.get(n, 0.0) for n in c.names])
        before = c.counts_at(first)
        for done in {*range(0, phase.examples, c.block_examples), phase.examples}:
            x = np.arange(20_000) / 20_000 * done
            t = np.clip(x / max(phase.ramp_examples, 1e-9), 0, 1)
            if phase.ramp == "step" or former is None or not phase.ramp_examples:
                t = np.ones_like(t)
            elif phase.ramp == "cosine":
                t = (1 - np.cos(np.pi * t)) / 2
            old = final if former is None else former
            integral = done * ((1 - t)[:, None] * old + t[:, None] * final).mean(0)
            counts = c.counts_at(first + done) - before
            assert np.abs(counts - integral).max() < 1.05
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
@given(curricula(), st.data())
def test_the_past_does_not_depend_on_the_future(c, data):
    at = data.draw(st.integers(0, c.total))
    longer = cu.Curriculum(
        (*c.phases, cu.Phase("new", 50, c.phases[0].weights)),
        c.sources, c.seed, c.block_examples, c.start,
    )  # fmt: skip
    assert cu.diff_past(c, longer, at) == []
    np.testing.assert_array_equal(
        c.lookup(np.arange(c.total)), longer.lookup(np.arange(c.total))
    )
    again = cu.Curriculum.from_json(c.to_json())
    assert again.fingerprint(at) == c.fingerprint(at)


def test_prolonging_a_phase_keeps_what_was_served():
    weights = {"a/x": 0.7, "b/x": 0.2999, "c/x": 0.0001}
    sizes = dict.fromkeys(weights, 10_000)
    short = cu.Curriculum((cu.Phase("p", 6400, weights),), sizes, 0, 64)
    long = cu.Curriculum((cu.Phase("p", 64_000, weights),), sizes, 0, 64)
    np.testing.assert_array_equal(
        short.lookup(np.arange(6400)), long.lookup(np.arange(6400))
    )
    assert cu.diff_past(short, long, 6400) == []


def test_a_changed_past_is_named():
    weights = {"a/x": 0.5, "b/x": 0.5}
    sizes = {"a/x": 100, "b/x": 100}
    old = cu.Curriculum((cu.Phase("p", 1000, weights),), sizes, 0, 64)
    new = cu.Curriculum((cu.Phase("p", 1000, {"a/x": 0.6, "b/x": 0.4}),), sizes, 0, 64)
    text = " ".join(cu.diff_past(old, new, 500))
    assert "share of a/x in p was 0.5 and is 0.6" in text
    assert "a/x: 250 examples were served, 301 would have been" in text
    assert cu.diff_past(old, new, 0) == []
    grown = cu.Curriculum(old.phases, {"a/x": 101, "b/x": 100}, 0, 64)
    assert "size of a/x was 100 and is 101" in " ".join(cu.diff_past(old, grown, 10))


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
    begin = time.perf_counter()
    c = cu.Curriculum(phases, sizes, 0, 16_384)
    c.counts_at(c.total)
    assert time.perf_counter() - begin < 5
    tracemalloc.start()
    cu.Curriculum(phases, sizes, 0, 16_384).counts_at(10)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


SIZES = {"en/web": 800, "en/hq": 200, "ru/web": 100, "tr/web": 10}


def shares(scheme, given=None, **kw):
    args = {"alpha": 0.3, "max_epochs": 4.0, "budget": 100} | kw
    return cu.mixture_shares(SIZES, scheme, given or {}, **args)


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


def test_given_shares_are_exact_and_the_rest_is_divided():
    found = shares("natural", {"en/*": 0.3, "en/hq": 0.1})
    assert found["en/hq"] == pytest.approx(0.1)
    assert found["en/web"] == pytest.approx(0.3)
    assert found["ru/web"] == pytest.approx(0.6 * 100 / 110)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scheme", "given_shares", "message"),
    [
        ("natural", {"xx/web": 0.1}, "matches no source"),
        ("natural", {"en/*": 0.1, "*/hq": 0.1}, "both match 'en/hq'"),
        ("explicit", {"en/*": 0.5}, "sum to 0.5"),
        ("natural", {"en/*": 1.5}, "more than 1"),
    ],
)
def test_bad_shares(scheme, given_shares, message):
    with pytest.raises(UserError, match=message):
        shares(scheme, given_shares)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (cu.Phase("p", 10, {"a/x": 0.5}), "sum to 0.5"),
        (cu.Phase("p", 10, {"a/y": 1.0}), "did you mean 'a/x'"),
        (cu.Phase("p", 10, {"a/x": -1.0, "b/x": 2.0}), "give a share"),
        (cu.Phase("p", 10, {"b/x": 1.0}), "no whole example"),
        (cu.Phase("p", 10, {"a/x": 1.0}, "linear", 11), "does not fit"),
        (cu.Phase("p", 10, {"a/x": 1.0}, "cubic", 1), "choose one of step"),
    ],
)
def test_bad_phases(phase, message):
    with pytest.raises(UserError, match=message):
        cu.Curriculum((phase,), {"a/x": 5, "b/x": 0})


def test_epoch_caps():
    c = cu.Curriculum((cu.Phase("p", 100, {"a/x": 1.0}),), {"a/x": 30})
    cu.check_epochs(c.epochs(), {"a/x": 4})
    with pytest.raises(UserError, match=r"'a/x' would be seen 3.33 times"):
        cu.check_epochs(c.epochs(), {"a/x": 3})
    with pytest.raises(UserError, match="did you mean 'a/x'"):
        cu.check_epochs(c.epochs(), {"a/y": 3})


def test_language_domain():
    found = language_domain({"ru": 0.4, "en": 0.6}, {"web": 0.75, "wiki": 0.25})
    assert found["ru/web"] == pytest.approx(0.3)
    assert sum(found.values()) == pytest.approx(1)
