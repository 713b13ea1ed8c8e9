"""Weights have mean 1 under the mixture and give the objective the shares asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamayun_jax.config import TokenWeightConfig, UserError
from gamayun_jax.data.token_weights import make_token_weights

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
    with pytest.raises(UserError, match="needs the corpus's tokenizer"):
        make_token_weights(TokenWeightConfig("bytes"), LANGUAGES, V, q)
