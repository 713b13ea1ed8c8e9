"""The ledger of exposures from made-up records, and the objective's planned shares."""

import dataclasses

import numpy as np
import pytest
from conftest import slow_but

from gamayun_jax import config as c
from gamayun_jax.data import ledger
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.data.token_weights import build_token_weights, objective_shares


def test_rows_are_sources_languages_and_all():
    assert ledger.grouped(["en/a", "ru/a", "en/b"]) == [
        ("en/a", ["en/a"]),
        ("en/b", ["en/b"]),
        ("en, all", ["en/a", "en/b"]),
        ("ru/a", ["ru/a"]),
        ("all", ["en/a", "ru/a", "en/b"]),
    ]


@pytest.mark.parametrize(
    ("before", "served", "repeats"),
    [(0, 7, 0), (0, 10, 0), (0, 13, 3), (0, 25, 15), (4, 8, 2), (12, 5, 5)],
)
def test_repeats_are_what_is_beyond_the_first_pass(before, served, repeats):
    """Against the positions of a source of 10 examples one by one."""
    size = ledger.SourceSize(10, 5.5, before)
    row = ledger.exposure({"en/a": served}, {"en/a": size}, ["en/a"], 8)
    former = {p % 10 for p in range(before)}
    again = 0
    for position in range(before, before + served):
        again += position % 10 in former
        former.add(position % 10)
    assert row["repeats"] == again == repeats
    assert row["repeated_share"] == again / served
    assert (row["tokens"], row["epochs"]) == (served * 8, served / 10)
    assert row["targets"] == round(served * 5.5)


def test_what_is_not_known_is_none():
    row = ledger.exposure({"en/a": 3}, {}, ["en/a"], 8)
    assert (row["examples"], row["tokens"]) == (3, 24)
    assert row["targets"] is row["epochs"] is row["repeats"] is None


def test_a_ledger_of_lineage_and_records():
    """A run that goes on from another at its cursor, stopped in its second stage."""
    table = [
        {"source": s, "phase": p, "tokens": n * 8, "epochs": n / 10}
        for p, s, n in (("one", "en/a", 6), ("one", "ru/a", 2), ("two", "en/a", 4))
    ]
    sources = {k: {"tokens": 70, "documents": 10} for k in ("en/a", "ru/a")}
    lineage = {
        "corpus": {"sources": sources},
        "curriculum": {"table": table, "objective": {"one": {"en": 0.5, "ru": 0.5}}},
        "transitions": {"one": {"cursors": "continue"}},
        "init_from": {"cursors": {"en/a": 7}},
    }
    records = [
        {
            "stage": stage,
            "objective": {"targets": en + ru, "squared_weights": squares},
            "languages": {
                "en": {"tokens": 8 * en, "targets": 7 * en, "weight": we},
                "ru": {"tokens": 8 * ru, "targets": 7 * ru, "weight": wr},
            },
        }
        for stage, en, ru, we, wr, squares in (
            ("one", 4, 0, 4.0, 0.0, 4.0),
            ("one", 2, 2, 2.0, 6.0, 20.0),
            ("two", 1, 0, 1.0, 0.0, 1.0),
        )
    ]
    found = ledger.make_ledger(lineage, 8, {"en/a": 7, "ru/a": 2}, records)
    en = found["sources"]["en/a"]
    assert en["size"] == 10
    assert (en["planned"]["examples"], en["served"]["examples"]) == (10, 7)
    assert (en["planned"]["repeats"], en["served"]["repeats"]) == (7, 4)
    assert en["served"]["targets"] == 42
    assert found["languages"]["ru"]["counted"] == {"tokens": 16, "targets": 14}
    assert ledger.uncounted(found) == {}
    assert ledger.counted_targets(found, ["en", "ru"]) == 63
    one, two = found["stages"]
    assert one["languages"]["en"] == {"tokens": 0.75, "planned": 0.5, "achieved": 0.5}
    assert one["effective_share"] == pytest.approx(12**2 / (8 * 24))
    assert two["languages"]["ru"] == {"tokens": 0, "planned": None, "achieved": 0}
    # A line that is lost is seen, and its language's targets are expected ones again.
    lost = ledger.make_ledger(lineage, 8, {"en/a": 7, "ru/a": 2}, records[1:])
    assert ledger.uncounted(lost) == {"en": (56, 24)}
    assert ledger.counted_targets(lost, ["en"]) is None
    texts = [row[4].text for row in ledger.ledger_table(lost).body]
    assert texts == ["~42", "~12"]
    # Former releases recorded no weights.
    for r in records:
        del r["objective"]
        for row in r["languages"].values():
            del row["weight"]
    former = ledger.make_ledger(lineage, 8, {"en/a": 7, "ru/a": 2}, records)
    assert {s["effective_share"] for s in former["stages"]} == {None}
    assert former["stages"][0]["languages"]["en"]["achieved"] is None


@pytest.mark.parametrize(
    "scheme", slow_but("target_share", of=("none", "static", "bytes", "target_share"))
)
def test_planned_shares_are_those_of_whole_passes(scheme, config, corpus):
    """Every source served once, as often as its size says: nothing is left to chance,
    so achieved and planned shares are the same."""
    sizes = corpus.examples(64)
    total = sum(sizes.values())
    weights = dict(zip(config.languages, (0.2, 0.5, 0.3), strict=True))
    given = weights if scheme in ("static", "target_share") else {}
    stage = dataclasses.replace(
        config.stages[0],
        tokens=total * 64,
        mixture=c.MixtureConfig("explicit", {k: n / total for k, n in sizes.items()}),
        token_weights=c.TokenWeightConfig(scheme, given),
    )
    data = dataclasses.replace(config.data, batch_size=1)
    cfg = dataclasses.replace(config, stages=(stage,), data=data)
    plan = make_data_plan(cfg, corpus)
    assert plan.served(total) == sizes
    tables = build_token_weights(cfg, corpus, plan.language_shares(cfg, 0), 0)
    planned = objective_shares(tables, cfg, corpus, plan.shares[0])
    achieved = np.zeros(3)
    batches = LocalBatches(cfg, corpus, plan, np.arange(1))
    for step in range(total):
        b = batches[step]
        w = b["loss_mask"] * tables[0][b["language"]] * tables[1][b["targets"]]
        achieved += np.bincount(b["language"].ravel(), w.ravel(), 3)
    np.testing.assert_allclose(
        list(planned.values()), achieved / achieved.sum(), rtol=2e-3
    )
