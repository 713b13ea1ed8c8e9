"""Weights have mean 1 under the mixture and give the objective the shares asked for."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import TokenWeightConfig, UserError
from gamayun_jax.data.token_weights import (
    build_token_weights,
    content_bytes_of,
    make_token_weights,
    objective_shares,
)

V = 17
LANGUAGES = ("en", "ru", "tr")
positive = st.floats(0.01, 1.0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(positive, min_size=3, max_size=3),
    st.lists(positive, min_size=3, max_size=3),
)
def test_language_weights_have_mean_one_under_the_mixture(weights, shares):
    q = np.array(shares) / sum(shares)
    given_weights = dict(zip(LANGUAGES, weights, strict=True))
    sampled = dict(zip(LANGUAGES, q.tolist(), strict=True))
    static, _ = make_token_weights(
        TokenWeightConfig("static", given_weights), LANGUAGES, V, sampled
    )
    assert q @ static == pytest.approx(1, rel=1e-5)
    ratio = static / np.array(weights)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    target, _ = make_token_weights(
        TokenWeightConfig("target_share", given_weights), LANGUAGES, V, sampled
    )
    # The objective's shares are the configured ones, whatever is sampled.
    np.testing.assert_allclose(q * target, np.array(weights) / sum(weights), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(positive, min_size=3, max_size=3), st.integers(0, 2**32 - 1))
def test_byte_weights_have_mean_one_and_count_bytes(shares, seed):
    """Over the tokens of the mixture, for any tokenizer and any languages."""
    rng = np.random.default_rng(seed)
    q = np.array(shares) / sum(shares)
    lengths = np.r_[0, 0, rng.integers(1, 9, V - 2)]  # two ids that spell nothing
    # Each language's frequencies of the tokens of its text.
    p_GV = np.concatenate([np.zeros((3, 2)), rng.dirichlet(np.ones(V - 2), 3)], axis=1)
    by_language, by_token = make_token_weights(
        TokenWeightConfig("bytes"),
        LANGUAGES,
        V,
        dict(zip(LANGUAGES, q.tolist(), strict=True)),
        lengths,
        dict(zip(LANGUAGES, (p_GV @ lengths).tolist(), strict=True)),
    )
    np.testing.assert_array_equal(by_language, 1)
    np.testing.assert_array_equal(by_token[:2], 1)  # EOS must be learnt too
    assert q @ p_GV @ by_token == pytest.approx(1, rel=1e-5)
    # A language's share of the objective is its share of the bytes.
    objective = q * (p_GV @ by_token)
    in_bytes = q * (p_GV @ lengths)
    np.testing.assert_allclose(objective, in_bytes / in_bytes.sum(), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(positive, min_size=3, max_size=3),
    st.lists(st.floats(0.3, 3.0), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_parity_weights_count_what_is_said(shares, content, seed):
    """A language's share of the objective is its share of the bytes, had all languages
    written what they say in the same one."""
    rng = np.random.default_rng(seed)
    q = np.array(shares) / sum(shares)
    lengths = np.r_[0, 0, rng.integers(1, 9, V - 2)]
    p_GV = np.concatenate([np.zeros((3, 2)), rng.dirichlet(np.ones(V - 2), 3)], axis=1)

    def tables(content, languages=LANGUAGES):
        return make_token_weights(
            TokenWeightConfig("parity"), languages, V,
            dict(zip(LANGUAGES, q.tolist(), strict=True)), lengths,
            dict(zip(LANGUAGES, (p_GV @ lengths).tolist(), strict=True)),
            dict(zip(LANGUAGES, content, strict=True)),
        )  # fmt: skip

    by_language, by_token = tables(content)
    objective = q * by_language * (p_GV @ by_token)
    assert objective.sum() == pytest.approx(1, rel=1e-5)
    said = q * (p_GV @ lengths) / np.array(content)
    np.testing.assert_allclose(objective, said / said.sum(), rtol=1e-5)
    assert q @ by_language == pytest.approx(1, rel=1e-5)  # of EOS, which spells nothing
    np.testing.assert_array_equal(by_token[:2], 1)
    # The language of reference is not in it, only ratios are.
    for a, b in zip(tables(content), tables(7 * np.array(content)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_parity_names_the_languages_without_parallel_text():
    def tables(**shares):
        return make_token_weights(
            TokenWeightConfig("parity"), LANGUAGES, V, shares, np.ones(V, int),
            dict.fromkeys(LANGUAGES, 1.0), {"en": 1.0},
        )  # fmt: skip

    with pytest.raises(UserError, match=r"there is none for ru, tr: add these"):
        tables(en=0.2, ru=0.3, tr=0.5)
    np.testing.assert_array_equal(tables(en=1.0)[0], [1, 0, 0])  # nobody asks for them


def test_what_content_takes_is_measured_on_parallel_units(corpus, config):
    """By hand on the embedded declaration; and over sets that have other languages."""
    texts = {k: [t for _, t in corpus.heldout("udhr", k)] for k in LANGUAGES}
    sizes = {k: sum(len(t.encode()) for t in v) for k, v in texts.items()}
    got = content_bytes_of(corpus, LANGUAGES)
    assert got == {k: n / sizes["en"] for k, n in sizes.items()}
    assert got["ru"] > 1.5  # Cyrillic takes two bytes a letter

    def entry(parallel=True, **sizes):
        return {
            "parallel": parallel,
            "languages": {k: {"bytes": n} for k, n in sizes.items()},
        }

    held = {
        "a": entry(en=100, ru=200),
        "b": entry(en=50, ru=70, tr=60),
        "c": entry(ru=9999, tr=1),  # no English
        "d": entry(parallel=False, en=1, ru=10**6, tr=1),
    }
    several = dataclasses.replace(corpus, manifest={"heldout": held})
    assert content_bytes_of(several, LANGUAGES) == {
        "en": 1.0, "ru": 270 / 150, "tr": 60 / 50,
    }  # fmt: skip
    del held["a"], held["b"], held["d"]
    assert content_bytes_of(several, LANGUAGES) == {"ru": 1.0, "tr": 1 / 9999}
    del held["c"]
    assert content_bytes_of(several, LANGUAGES) == {}


def test_the_objective_that_parity_plans_is_content(corpus, config, replace):
    """Through the corpus, as a run has it: the shares of what the sources say."""
    stage = dataclasses.replace(
        config.stages[0], token_weights=TokenWeightConfig("parity")
    )
    cfg = dataclasses.replace(config, stages=(stage,))
    shares = {"en/help": 0.4, "ru/help": 0.4, "tr/help": 0.2}
    by_language = {k.split("/")[0]: s for k, s in shares.items()}
    tables = build_token_weights(cfg, corpus, by_language, 0)
    planned = objective_shares(tables, cfg, corpus, shares)
    content = content_bytes_of(corpus, LANGUAGES)
    said = {
        k: shares[f"{k}/help"] * corpus.sources[f"{k}/help"].bytes
        / corpus.sources[f"{k}/help"].tokens / content[k]
        for k in LANGUAGES
    }  # fmt: skip
    for k in LANGUAGES:  # but for the ends of documents
        assert planned[k] == pytest.approx(said[k] / sum(said.values()), abs=0.01)


def test_without_a_scheme_every_token_weighs_one():
    tables = make_token_weights(TokenWeightConfig(), LANGUAGES, V, {"en": 1.0})
    np.testing.assert_array_equal(np.concatenate(tables), 1)


def test_a_language_that_is_never_sampled_may_have_no_target():
    shares = {"en": 0.25, "ru": 0.75, "tr": 0.0}
    weights = TokenWeightConfig("target_share", {"en": 0.5, "ru": 0.5, "tr": 0.0})
    by_language, _ = make_token_weights(weights, LANGUAGES, V, shares)
    np.testing.assert_allclose(by_language, [2, 2 / 3, 0], rtol=1e-6)


def test_weights_that_cannot_be():
    q = {"en": 1.0}
    one = TokenWeightConfig("target_share", {"en": 0.5, "ru": 0.5, "tr": 0.0})
    with pytest.raises(UserError, match="'ru' 0.5 of the objective"):
        make_token_weights(one, LANGUAGES, V, q)
    for scheme in ("static", "target_share"):
        none = TokenWeightConfig(scheme, dict.fromkeys(LANGUAGES, 0.0))
        with pytest.raises(UserError, match="no token would train"):
            make_token_weights(none, LANGUAGES, V, q)
    for scheme in ("bytes", "parity"):
        with pytest.raises(UserError, match="needs the corpus's tokenizer"):
            make_token_weights(TokenWeightConfig(scheme), LANGUAGES, V, q)
