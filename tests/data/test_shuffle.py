"""The shuffled order: a permutation of the same examples, scattered as at random."""

import dataclasses
import itertools

import numpy as np
import pytest
import test_curriculum
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax import config as c
from gamayun_jax.data import curriculum as cu
from gamayun_jax.data import shuffle
from gamayun_jax.data.continuity import diff_past
from gamayun_jax.data.plan import make_data_plan

SETTINGS = settings(max_examples=60, deadline=None)
WEIGHTS = {"a/x": 0.55, "b/x": 0.3, "c/x": 0.1, "d/x": 0.05}


def one_phase(examples, order="shuffled", seed=0, block=64):
    phase = cu.Phase("p", examples, WEIGHTS, order=order)
    return cu.Curriculum((phase,), dict.fromkeys(WEIGHTS, 10**6), seed, block)


def split_mix(state):
    """SplitMix64 as published, one number at a time."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def network(x, n, key):
    """Feistel rounds and cycle walking as they are defined, for one number."""
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    keys = list(itertools.islice(split_mix(key), shuffle.ROUNDS))
    while True:
        left, right = divmod(x, 1 << low)
        for k, of_round in enumerate(keys):
            by, width = (left, low) if k % 2 else (right, bits - low)
            number = next(itertools.islice(split_mix(of_round), by, None))
            if k % 2:
                right ^= number >> 64 - width
            else:
                left ^= number >> 64 - width
        x = left << low | right
        if x < n:
            return x


def test_the_hash_is_the_published_one():
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert shuffle.split_mix(1234567, 3).tolist() == first


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4096, 4097])
def test_a_permutation_by_its_definition(n):
    key = shuffle.make_key(n, "any")
    found = shuffle.permuted(np.arange(n), n, key)
    assert sorted(found.tolist()) == list(range(n))
    some = np.random.default_rng(n).integers(0, n, 20)
    assert found[some].tolist() == [network(x, n, key) for x in some.tolist()]
    assert shuffle.permuted(some, n, key).tolist() == found[some].tolist()


def test_the_largest_phase_fits():
    ends = np.array([0, 1, cu.LONGEST - 1])
    found = shuffle.permuted(ends, cu.LONGEST, 7)
    assert len(set(found.tolist())) == 3
    assert 0 <= found.min() <= found.max() < cu.LONGEST


@SETTINGS
@given(test_curriculum.curricula())
def test_each_phase_serves_the_same_examples(even):
    mixed = dataclasses.replace(
        even,
        phases=tuple(dataclasses.replace(p, order="shuffled") for p in even.phases),
    )
    first = 0
    for phase in even.phases:
        of = np.arange(first, first := first + phase.examples)
        pairs = [
            sorted(zip(*(x.tolist() for x in k.lookup(of)), strict=True))
            for k in (even, mixed)
        ]
        assert pairs[0] == pairs[1]
    assert mixed.table() == even.table()
    assert mixed.epochs() == even.epochs()


@SETTINGS
@given(st.integers(1, 400), st.sampled_from([1, 2, 7, 32, 1024]), st.integers(0, 9))
def test_blocks_are_only_where_counts_are_kept(examples, block, seed):
    """The order is of the phase: another size of block changes nothing."""
    a, b = (one_phase(examples, seed=seed, block=k) for k in (block, 16))
    every = np.arange(examples)
    np.testing.assert_array_equal(a.lookup(every), b.lookup(every))


def test_blocks_scatter_as_random_draws():
    """Against draws without replacement: variance, neighbours and pairs; interleaved
    blocks are within 1 of the shares."""
    n, block = 400_000, 100
    mixed, even = (one_phase(n, k, block=block) for k in ("shuffled", "interleaved"))
    shares = np.array(list(WEIGHTS.values()))
    drawn = np.diff(mixed.blocks[0].counts, axis=0)
    assert np.abs(np.diff(even.blocks[0].counts, axis=0) - block * shares).max() < 2
    expected = block * shares * (1 - shares) * (n - block) / (n - 1)
    off = drawn - block * shares
    np.testing.assert_allclose((off**2).mean(0), expected, rtol=0.1)  # 4.5 sigma
    correlated = (off[1:] * off[:-1]).mean(0) / expected
    assert np.abs(correlated).max() < 4.5 / np.sqrt(len(off))
    source, _ = mixed.lookup(np.arange(20_000))
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (source[:-1], source[1:]), 1 / (len(source) - 1))
    np.testing.assert_allclose(pairs, np.outer(shares, shares), atol=0.02)


def test_seeds_and_phases_have_orders_of_their_own():
    two = cu.Curriculum(
        tuple(cu.Phase(k, 500, WEIGHTS, order="shuffled") for k in "pq"),
        dict.fromkeys(WEIGHTS, 10**6),
    )
    source, _ = two.lookup(np.arange(1000))
    other, _ = one_phase(500, seed=1).lookup(np.arange(500))
    orders = [source[:500], source[500:], other]
    for a, b in itertools.combinations(orders, 2):
        assert (np.sort(a) == np.sort(b)).all()
        assert 0.2 < (a == b).mean() < 0.6  # by chance 0.405


def test_a_begun_phase_cannot_be_prolonged():
    old, new = one_phase(1000), one_phase(1001)
    lines = diff_past(old, new, 1)
    assert "examples of p was 1000 and is 1001" in lines
    assert diff_past(old, new, 0) == []
    even = one_phase(1000, "interleaved")
    assert "order of p was shuffled and is interleaved" in diff_past(old, even, 1)


def test_plans_alone_count_nothing(monkeypatch):
    """Totals, tables and epochs of 2.5T tokens cost no pass over the examples."""
    monkeypatch.setattr(shuffle, "turn_counts", None)
    curriculum = one_phase(610_000_000, block=16_384)
    assert curriculum.counts_at(curriculum.total).sum() == 610_000_000
    assert len(curriculum.table()) == 4
    assert curriculum.epochs()["a/x"] > 300


def test_a_ramp_in_a_shuffled_stage_is_refused(config, corpus):
    second = config.stages[1]
    mixture = dataclasses.replace(second.mixture, order="shuffled")
    cfg = dataclasses.replace(
        config, stages=(config.stages[0], dataclasses.replace(second, mixture=mixture))
    )
    with pytest.raises(c.UserError, match=r"stages.enrich.mixture has order=shuffled"):
        make_data_plan(cfg, corpus)
