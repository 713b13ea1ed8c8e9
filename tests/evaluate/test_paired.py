"""The paired rule: against scipy, against simulated truths, and with itself."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gamayun_jax.evaluate import paired


def items(values, weights=None):
    weights = np.ones(len(values)) if weights is None else weights
    pairs = zip(values, weights, strict=True)
    return {str(i): (float(v), float(w)) for i, (v, w) in enumerate(pairs)}


def cell(values, weights=None):
    return paired.estimates({"en": items(values, weights)}, False)["en"]


def changed(up, down, n):
    return [1.0] * up + [-1.0] * down + [0.0] * (n - up - down)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 17, 40, 300])
def test_answers_are_compared_by_the_exact_test(n):
    """McNemar's: the binomial test of scipy, whatever items did not change."""
    for up in range(0, n + 1, 1 + n // 40):
        want = stats.binomtest(up, n, 0.5).pvalue
        for same in (1, 3, 1000):
            found = cell(changed(up, n - up, n + same))
            assert found.p == pytest.approx(want, rel=1e-9), (up, n)


def test_seven_of_a_hundred_all_one_way():
    """The bootstrap's interval says p < 0.001 here: no resample has the other sign."""
    assert cell(changed(7, 0, 100)).p == pytest.approx(2 / 2**7)
    assert cell(changed(5, 0, 100)).p == pytest.approx(2 / 2**5)
    marked = paired.verdicts([cell(changed(7, 0, 100))] * 12, [1] * 12)
    assert set(marked) == {"same"}


def test_few_changes_of_different_sizes_try_all_signs():
    rng = np.random.default_rng(0)
    for n in (3, 8, 12):
        d = rng.normal(1, 1, n)
        want = stats.permutation_test(
            (d,), np.sum, permutation_type="samples", n_resamples=np.inf
        ).pvalue
        assert paired.sign_test(d) == pytest.approx(want)
    assert paired.sign_test(rng.normal(1, 1, paired.FEW + 1)) is None


def test_many_changes_are_student_s_t():
    d = np.random.default_rng(1).normal(0.1, 1, 200)
    want = stats.ttest_1samp(d, 0)
    found, ends = cell(d), want.confidence_interval(0.95)
    assert found.p == pytest.approx(want.pvalue)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))


def test_bits_per_byte_differ_by_sums_not_by_means():
    """The interval is the bootstrap's, of a ratio of sums."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(10, 1000, 200)
    d = sizes * rng.normal(0.05, 0.1, 200)
    found = cell(d, sizes)
    assert found.value == pytest.approx(d.sum() / sizes.sum())
    picks = rng.integers(0, 200, (4000, 200))
    draws = d[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert high - low == pytest.approx(found.high - found.low, rel=0.08)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 1.0, 0.25, -0.4, 3.0]), min_size=1),
    st.lists(st.integers(1, 9), min_size=1),
    st.booleans(),
)
def test_the_interval_and_the_p_value_agree(values, sizes, parallel):
    sizes = [sizes[i % len(sizes)] for i in range(len(values))]
    languages = {"en": items(values), "ru": items(values[::-1], sizes)}
    for found in paired.estimates(languages, parallel).values():
        assert 0 <= found.p <= 1
        if found.low is None:
            assert found.p == 1
            continue
        assert found.low <= found.value <= found.high
        assert (found.low > 0 or found.high < 0) == (found.p <= paired.LEVEL)


def test_the_interval_and_the_exact_test_agree():
    for n in (1, 30, 1000):
        for up in range(0, 50, 2):
            for down in range(0, 50, 3):
                found = cell(changed(up, down, up + down + n))
                if found.low is not None:
                    outside = found.low > 0 or found.high < 0
                    assert outside == (found.p <= paired.LEVEL), (up, down, n)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 100))
def test_more_items_for_it_never_weaken_it(up, down, same):
    fewer = cell(changed(up, down, up + down + same + 1))
    more = cell(changed(up + 1, down, up + down + same + 1))
    if up >= down:
        assert more.p <= fewer.p + 1e-12
    mirrored = cell(changed(down, up, up + down + same + 1))
    assert mirrored.p == pytest.approx(fewer.p)
    assert mirrored.value == pytest.approx(-fewer.value)


NULLS = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "few change": lambda rng, n: rng.normal(0, 1, n) * (rng.random(n) < 0.1),
    "answers": lambda rng, n: rng.choice([-1, 0, 1], n, p=[0.15, 0.7, 0.15]),
}


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("n", [12, 60, 200])
def test_false_alarms_are_at_most_5_percent(null, n):
    rng = np.random.default_rng(n)
    trials = 500
    p = np.array([cell(NULLS[null](rng, n)).p for _ in range(trials)])
    wide = 3.3 * math.sqrt(0.05 * 0.95 / trials)
    assert (p <= 0.05).mean() < 0.05 + wide
    if null == "normal" and n > 12:
        assert (p <= 0.05).mean() > 0.05 - wide
    assert (p <= 0.001).mean() < 0.001 + 3.3 * math.sqrt(0.001 / trials)


@pytest.mark.parametrize("parallel", [True, False])
def test_the_mean_over_languages(parallel):
    """Its error is that of ids if they are shared, of items if not; under the null
    hypothesis it raises no more alarms than a language."""
    rng = np.random.default_rng(3)
    alarms, trials, n = 0, 400, 50
    for _ in range(trials):
        shared = rng.normal(0, 1, n) if parallel else 0
        rows = {k: items(shared + rng.normal(0, 0.5, n)) for k in ("en", "ru", "tr")}
        found = paired.estimates(rows, parallel)
        alarms += found[paired.MACRO].p <= 0.05
        mean = np.mean([found[k].value for k in rows])
        assert found[paired.MACRO].value == pytest.approx(mean)
    assert 0.02 < alarms / trials < 0.08
    same = paired.estimates(
        dict.fromkeys(("en", "ru"), items(rng.normal(0, 1, n))), True
    )
    assert same[paired.MACRO].low == pytest.approx(same["en"].low)


def test_300_cells_keep_5_percent_and_show_the_one_that_is_real():
    rng = np.random.default_rng(4)
    alarms, tables = 0, 10
    for _ in range(tables):
        found = [cell(rng.normal(0, 1, 60)) for _ in range(300)]
        alarms += set(paired.verdicts(found, [1] * 300)) != {"same"}
    assert alarms <= 4  # 0.5 expected; P(more than 4) < 0.01 %
    for real in (rng.normal(-0.8, 1, 100), changed(2, 30, 100)):
        found[150] = cell(real)
        marks = paired.verdicts(found, [1] * 300)
        assert marks[150] == "worse"
        assert paired.verdicts(found, [-1] * 300)[150] == "better"


def test_holm():
    p = [0.01, 0.04, 0.03, 0.005]
    hand = [0.03, 0.06, 0.06, 0.02]  # Holm 1979, worked by hand
    assert paired.holm(p) == pytest.approx(hand)
    assert paired.holm([0.2, 0.001, 0.2]) == pytest.approx([0.4, 0.003, 0.4])
    assert paired.holm([0.03, 0.001, 0.02]) == pytest.approx([0.04, 0.003, 0.04])
    assert paired.holm([]) == []


def test_nothing_to_tell_an_error_from_has_no_interval():
    for values in ([1.0], [0.0] * 5):
        found = cell(values)
        assert (found.low, found.high, found.p) == (None, None, 1.0)
    one_each = paired.estimates({"en": items([1.0]), "ru": items([0.5])}, False)
    assert one_each[paired.MACRO].low is None
    one_id = paired.estimates({"en": items([1.0]), "ru": items([0.5])}, True)
    assert one_id[paired.MACRO].low is None
    assert paired.unpaired(0.5, 0.0, 0.0).low is None
    assert paired.unpaired(0.5, 0.1, None).low is None
    assert cell([1.0] * 8).high > cell([1.0] * 8).low  # all right is no certainty
    assert paired.estimates({"en": {}}, True) == {}
