"""The search for shares with which languages cost alike, and what is kept of it."""

import dataclasses
import json
import math

import pytest
from conftest import LANGUAGES
from hypothesis import given
from hypothesis import strategies as st

from gamayun_jax.config import TokenizerConfig, UserError
from gamayun_jax.data import build, fertility
from gamayun_jax.data.heldout_sets import HeldoutSet, halves
from gamayun_jax.data.tokenizer_parity import even_out, tuning_texts


@given(st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=40))
def test_halves_are_parts_and_keep_documents_together(numbers):
    units = [(f"article.{n}.{k}", f"{n} {k}") for n in numbers for k in (1, 2)]
    tuned, others = halves(units)
    assert sorted(tuned + others) == sorted(units)
    assert not {t.split()[0] for _, t in tuned} & {t.split()[0] for _, t in others}
    again = halves([(i, "in another language") for i, _ in units])
    assert [[i for i, _ in part] for part in again] == [
        [i for i, _ in part] for part in (tuned, others)
    ]


def test_units_by_number_are_halved_too():
    tuned, others = halves([(str(n), "") for n in range(400)])
    assert 150 < len(tuned) < 250 > len(others) > 150


class FakeTokenizer:
    """A unit costs as many tokens as its length over the root of its language's share;
    texts are the language's name again and again."""

    def __init__(self, shares):
        self.shares = shares

    def encode(self, text):
        return [0] * round(1000 * len(text) / math.sqrt(self.shares[text[0]]))


def test_costs_are_evened_out_and_the_best_round_is_taken():
    texts = {"a": ["a" * 9], "b": ["b" * 16], "c": ["c" * 12]}
    cfg, asked = TokenizerConfig(999, parity_set="s", parity_rounds=3), []

    def train(given):
        asked.append(dict(given.shares))
        assert dataclasses.replace(given, shares={}) == cfg
        return FakeTokenizer(given.shares or dict.fromkeys("abc", 1 / 3))

    tokenizer, record = even_out(train, cfg, texts)
    uneven = [r["gini"] for r in record["rounds"]]
    assert len(asked) == len(uneven) == 4
    assert asked[0] == {}  # the config's own training, to the byte
    # By this law of costs the first round already finds what is even.
    assert uneven[0] > 0.1
    assert uneven[1] < 1e-3
    assert record["taken"] == uneven.index(min(uneven))
    assert tokenizer.shares == pytest.approx(
        record["rounds"][record["taken"]]["shares"]
    )
    tokens = {k: len(tokenizer.encode(v[0])) for k, v in texts.items()}
    assert tokens == record["rounds"][record["taken"]]["tokens"]
    for r in record["rounds"]:
        assert sum(r["shares"].values()) == pytest.approx(1)
    assert even_out(train, cfg, texts)[1] == record
    assert json.loads(json.dumps(record)) == record


def test_what_cannot_be_tuned_on():
    units = [("x.1", "a"), ("y.1", "b"), ("z.1", "c"), ("w.1", "d")]
    alone = next([u] for u in units if not halves([u])[0])  # not in the first half
    sets = [
        HeldoutSet("own", {"en": units}, False, "there are units without an id"),
        HeldoutSet("two", {"en": units, "ru": units}, True, ""),
        HeldoutSet("one", {"en": alone, "ru": alone}, True, ""),
    ]

    def texts(name, *languages):
        return tuning_texts(TokenizerConfig(999, parity_set=name), sets, languages)

    assert texts("", "en", "tr") == {}
    assert set(texts("two", "en", "ru")) == {"en", "ru"}
    for name, languages, message in (
        ("three", ["en"], r"parity_set='three' is none of corpus.heldout \(own, two"),
        ("own", ["en"], r"is not parallel \(there are units without an id\)"),
        ("two", ["en", "tr", "pl"], "has no tr, pl, and corpus.sources has"),
        ("one", ["en", "ru"], "too few units to leave half of them"),
    ):
        with pytest.raises(UserError, match=message):
            texts(name, *languages)
    with pytest.raises(UserError, match="is for training, and corpus.tokenizer.model"):
        TokenizerConfig(model="there", parity_set="two")


@pytest.fixture(scope="module")
def evened(config, tmp_path_factory):
    tokenizer = dataclasses.replace(
        config.corpus.tokenizer, parity_set="udhr", parity_rounds=3
    )
    cfg = dataclasses.replace(
        config, corpus=dataclasses.replace(config.corpus, tokenizer=tokenizer)
    )
    folder = tmp_path_factory.mktemp("evened") / "corpus"
    return cfg, build.build(cfg, folder, workers=1, progress=False)


def test_a_corpus_keeps_the_search_and_its_tokenizer_is_more_even(evened, corpus):
    """On the units that were not tuned on, against the same text in equal shares."""
    _, made = evened
    record = made.manifest["tokenizer"]["parity"]
    assert record["set"] == "udhr"
    assert [set(r["shares"]) for r in record["rounds"]] == [set(LANGUAGES)] * 4
    assert made.tokenizer().vocab_size == corpus.tokenizer().vocab_size

    def uneven(tokenizer, part):
        texts = {
            k: [t for _, t in halves(made.heldout("udhr", k))[part]] for k in LANGUAGES
        }
        return fertility.gini([r["tokens"] for r in fertility.report(tokenizer, texts)])

    best = record["rounds"][record["taken"]]["gini"]
    assert best == pytest.approx(uneven(made.tokenizer(), 0))
    assert record["rounds"][0]["gini"] == pytest.approx(uneven(corpus.tokenizer(), 0))
    assert uneven(made.tokenizer(), 1) < 0.7 * uneven(corpus.tokenizer(), 1)


def test_the_report_scores_what_was_not_tuned_on(evened):
    _, made = evened
    text = fertility.compare(made, {"of the corpus": made.tokenizer()})
    units = {k: halves(made.heldout("udhr", k))[1] for k in LANGUAGES}
    count = len(units["en"])
    assert 0 < count < len(made.heldout("udhr", "en"))
    assert f"held-out set udhr, {count} units that no shares were tuned on" in text
    rows = fertility.report(
        made.tokenizer(), {k: [t for _, t in v] for k, v in units.items()}
    )
    assert fertility.format_report(rows) in text


@pytest.mark.parametrize("killed", ["after the tokenizer", "in the search"])
def test_a_build_that_goes_on_makes_the_same(evened, killed, tmp_path, monkeypatch):
    cfg, made = evened
    function = "tokenise_all" if killed == "after the tokenizer" else "fit_tokenizer"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, function, stop)
        with pytest.raises(KeyboardInterrupt):
            build.build(cfg, tmp_path / "corpus", workers=1, progress=False)
    again = build.build(cfg, tmp_path / "corpus", workers=1, progress=False)
    assert again.manifest == made.manifest


def test_other_corpora_keep_their_recipe(config, replace):
    """Corpora of a former release are found again; another search is another corpus."""
    recipes = []
    for name, rounds in (("", 6), ("", 9), ("udhr", 6), ("udhr", 9)):
        cfg = replace(config, "corpus.tokenizer.parity_set", name)
        cfg = replace(cfg, "corpus.tokenizer.parity_rounds", rounds)
        recipe, _ = build.recipe_of(cfg, [], [])
        recipes.append(recipe)
    assert recipes[0] == recipes[1]
    assert "parity" not in recipes[0]
    assert len({json.dumps(r) for r in recipes}) == 3
