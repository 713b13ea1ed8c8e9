"""The rules of a study's analysis: intervals, errors and verdicts on known truths."""

import numpy as np
import pytest
from scipy import stats

from gamayun_jax.config import UserError
from gamayun_jax.evaluate.paired import Estimate
from gamayun_jax.study import analysis
from gamayun_jax.study.design import Outcome

OUTCOME = Outcome("others", ("help",))
LANGUAGES = ("en", "ru", "de", "fr", "tr", "ja", "zh")


def world(rng, seeds, truth=0.0, seed_sd=0.01, language_sd=0.005, unit_sd=0.01):
    """Pairs of records whose true difference is `truth`, with random seeds, languages
    and units, and the units."""
    ids = [f"u{i}" for i in range(30)]
    sizes = {k: rng.integers(50, 400, len(ids)) for k in LANGUAGES}
    level = {k: 2 + rng.normal(0, 0.3) for k in LANGUAGES}
    hard = rng.normal(0, 0.3, len(ids))
    gains = {k: rng.normal(0, language_sd) for k in LANGUAGES}
    of_units = rng.normal(0, unit_sd, len(ids))
    pairs = {}
    for seed in range(seeds):
        of_seed, pair = rng.normal(0, seed_sd), []
        for arm, on in (("a", 1), ("b", 0)):
            bits, means = {}, {}
            for k in LANGUAGES:
                gain = truth + gains[k] + of_units + of_seed
                noise = rng.normal(0, 0.01, len(ids))
                bits[k] = sizes[k] * (level[k] + hard + on * gain + noise)
                means[k] = bits[k].sum() / sizes[k].sum()
            row = {"arm": arm, "seed": seed, "bits": {"help": bits}}
            pair.append({**row, "sets": {"help": means}})
        pairs[seed] = tuple(pair)
    of = {k: {"ids": list(ids), "bytes": sizes[k].tolist()} for k in LANGUAGES}
    return pairs, {"help": of}


def found_in(pairs, units, outcome=OUTCOME):
    return analysis.paired_difference(
        pairs, outcome, analysis.Resampled(units, resamples=300)
    )


def rates(seeds, rounds, language_sd=0.005, unit_sd=0.01):
    """How often the interval held the truth, and how often it was claimed falsely that
    there is a difference."""
    rng = np.random.default_rng([seeds, int(1000 * language_sd)])
    held = wrong = 0
    for _ in range(rounds):
        d = found_in(*world(rng, seeds, 0.0, 0.01, language_sd, unit_sd))
        held += d.estimate.low <= 0 <= d.estimate.high
        wrong += analysis.verdicts([d])[0][1] != analysis.UNDECIDED
    return held / rounds, wrong / rounds


@pytest.mark.parametrize("seeds", [4, 8])
def test_intervals_hold_the_truth(seeds):
    """At 95 % or somewhat more; and nothing is claimed falsely in over 5 %."""
    held, wrong = rates(seeds, 100)
    assert held >= 0.92
    assert wrong <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [4, 8])
@pytest.mark.parametrize("sds", [(0.0, 0.0), (0.005, 0.01), (0.01, 0.02)])
def test_intervals_hold_the_truth_whatever_varies(seeds, sds):
    held, wrong = rates(seeds, 1000, *sds)
    assert 0.94 <= held <= 0.999
    assert wrong <= 0.05


def test_an_interval_over_seeds_alone_would_be_too_narrow():
    """Where languages differ more than seeds do, it must be wider than theirs."""
    pairs, units = world(np.random.default_rng(1), 8, 0, 0.002, 0.02, 0.0)
    d = found_in(pairs, units)
    alone = analysis.difference(d.by_seed)
    assert d.estimate.value == alone.estimate.value
    assert d.estimate.p == alone.estimate.p
    width = [x.high - x.low for x in (d.estimate, alone.estimate)]
    assert width[0] > 2 * width[1]
    one = found_in(pairs, units, Outcome("ru", ("help",), "ru")).estimate
    assert one.high - one.low < 0.7 * width[0]  # its language is not drawn again


def test_paired_t_and_signs_as_scipy_has_them():
    values = np.random.default_rng(2).normal(-0.01, 0.01, 6)
    d = analysis.difference(dict(enumerate(values)))
    test = stats.ttest_1samp(values, 0.0)
    assert d.estimate.p == pytest.approx(test.pvalue)
    ends = test.confidence_interval()
    assert (d.estimate.low, d.estimate.high) == pytest.approx((ends.low, ends.high))
    flips = stats.permutation_test(
        (values, np.zeros(6)), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert d.signs == pytest.approx(flips.pvalue)
    assert (d.n, d.sd) == (6, pytest.approx(values.std(ddof=1)))


def test_smallest_effect_is_found_with_the_power_that_it_says():
    """The formula is the usual approximation: near 80 %."""
    rng, n = np.random.default_rng(3), 8
    effect = analysis.smallest_effect(0.01, n)
    assert effect == pytest.approx(0.01 * (2.3646 + 0.8960) / 8**0.5, rel=1e-4)
    values = rng.normal(effect, 0.01, (2000, n))
    found = stats.ttest_1samp(values, 0.0, axis=1).pvalue <= 0.05
    assert 0.75 <= found.mean() <= 0.85


def test_the_smallest_effect_of_a_pair_has_a_verdict_with_that_power():
    """Also where the interval is wider than that over seeds: then it counts."""
    rng, n, sd, error = np.random.default_rng(4), 8, 0.01, 0.012

    def judged(effect):
        values = rng.normal(effect, sd, n)
        d = analysis.difference(dict(enumerate(values)), lambda: error)
        return d, analysis.verdicts([d])[0][1]

    found = [judged(0.0)[0] for _ in range(200)]
    smallest = np.median([d.smallest for d in found])
    assert smallest > 2 * analysis.smallest_effect(sd, n)
    told = [judged(smallest)[1] for _ in range(1000)]
    assert 0.75 <= np.mean([t == analysis.CONTRADICTED for t in told]) <= 0.85
    alone = analysis.difference(dict(enumerate(rng.normal(0, sd, n))))
    assert alone.smallest == analysis.smallest_effect(alone.sd, n)


def test_verdicts_need_both_the_test_and_the_interval():
    def told(value, low, high, p):
        e = Estimate(value, low, high, p)
        return analysis.Difference(e, None, None, None, {})

    rows = [
        (told(-1.0, -1.5, -0.5, 0.01), analysis.SUPPORTED),
        (told(1.0, 0.5, 1.5, 0.01), analysis.CONTRADICTED),
        (told(-1.0, -2.5, 0.5, 0.01), analysis.UNDECIDED),  # units or languages differ
        (told(-1.0, -1.5, -0.5, 0.04), analysis.UNDECIDED),  # by Holm
        (told(-1.0, None, None, 1.0), analysis.UNDECIDED),
    ]
    made = analysis.verdicts([d for d, _ in rows])
    assert [v for _, v in made] == [v for _, v in rows]
    assert made[0][0] == pytest.approx(0.05)
    assert analysis.verdicts([]) == []


def test_few_seeds_have_no_interval():
    pairs, units = world(np.random.default_rng(4), 1)
    d = found_in(pairs, units)
    assert (d.n, d.estimate.low, d.estimate.p, d.sd) == (1, None, 1.0, None)
    assert d.by_seed[0] == d.estimate.value
    none = found_in({}, units)
    assert none.n == 0
    assert np.isnan(none.estimate.value)


def test_outcomes_are_means_of_means():
    sets = {"a": {"en": 1.0, "ru": 2.0, "de": 4.0}, "b": {"en": 3.0, "ru": 5.0}}
    for languages, value in (("others", 4.0), ("all", (7 / 3 + 4) / 2), ("ru", 3.5)):
        outcome = Outcome("x", ("a", "b"), languages)
        assert analysis.outcome_of(sets, outcome) == pytest.approx(value)


def test_the_same_bits_give_the_same_interval():
    pairs, units = world(np.random.default_rng(5), 4)
    assert found_in(pairs, units) == found_in(pairs, units)


def test_units_of_other_texts_are_refused():
    pairs, units = world(np.random.default_rng(6), 2)
    units["help"]["tr"]["ids"].pop()
    units["help"]["tr"]["bytes"].pop()
    with pytest.raises(UserError, match="has 30 units of tr in held-out set 'help'"):
        found_in(pairs, units)
