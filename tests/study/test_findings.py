"""What is found in a study's records, where the truth is known."""

import json

import numpy as np
import pytest
from synthetic_study import LANGUAGES, ORDERS, registration, write_study

from gamayun_jax.config import UserError
from gamayun_jax.report import study_tables
from gamayun_jax.report.study import write_study as write_page
from gamayun_jax.study import analysis, findings
from gamayun_jax.study.registration import digest

STAGED, REVERSED = "3M-staged-decay", "3M-reversed-decay"


def small():
    """One size and rate: 24 runs."""
    return registration(sizes=("3M",), rates=("decay",))


def verdicts(f):
    return {c.name: c.verdict for c in f.hypotheses}


def test_effects_are_found_and_nothing_else(tmp_path):
    f = findings.analyse(
        write_study(tmp_path, frozen=small(), effects={"reversed": 0.02})
    )
    assert verdicts(f) == {
        "order": analysis.SUPPORTED, "stages": analysis.UNDECIDED,
        "ramp": analysis.UNDECIDED, "english": analysis.UNDECIDED,
    }  # fmt: skip
    first = f.hypotheses[0].difference
    assert (first.n, first.estimate.items) == (6, 6)
    assert first.estimate.low < -0.02 < first.estimate.high < 0
    p = [c.difference.estimate.p for c in f.hypotheses]
    assert [c.p_adjusted for c in f.hypotheses] == analysis.holm(p)
    assert f.outcomes[0].name == f.study["primary"]


def test_the_opposite_is_told_as_plainly(tmp_path):
    f = findings.analyse(
        write_study(tmp_path, frozen=small(), effects={"reversed": -0.03})
    )
    assert verdicts(f)["order"] == analysis.CONTRADICTED


def test_no_verdict_before_all_runs_are_there(tmp_path):
    def few(record):
        return None if (record["arm"], record["seed"]) == (REVERSED, 4) else record

    f = findings.analyse(
        write_study(tmp_path, frozen=small(), effects={"reversed": 0.02}, change=few)
    )
    assert set(verdicts(f).values()) == {findings.NO_VERDICT}
    assert (f.planned, f.missing) == (24, 1)
    told = findings.to_json(f)
    assert told["runs"]["missing"] == {REVERSED: [4]}
    assert [h["n"] for h in told["hypotheses"]] == [5, 6, 6, 6]
    assert told["hypotheses"][0]["p_adjusted"] is None


def test_diverged_runs_are_named_and_their_pairs_left_out(tmp_path):
    def bad(record):
        if (record["arm"], record["seed"]) != (REVERSED, 2):
            return record
        keys = ("arm", "seed", "sha256")
        return {k: record[k] for k in keys} | {"status": "diverged", "why": "NaN"}

    f = findings.analyse(
        write_study(tmp_path, frozen=small(), effects={"reversed": 0.02}, change=bad)
    )
    c = f.hypotheses[0]
    assert (c.verdict, c.difference.n, c.left_out) == (analysis.SUPPORTED, 5, [2])
    assert 2 not in c.difference.by_seed
    assert f.arm(REVERSED).diverged == {2: "NaN"}
    rows = {r["outcome"]: r for r in findings.noise(f) if r["arm"] == REVERSED}
    assert rows["others"]["n"] == 5
    whole = findings.analyse(
        write_study(tmp_path / "whole", frozen=small(), effects={"reversed": 0.02})
    )
    one, other = c.difference.by_seed, whole.hypotheses[0].difference.by_seed
    assert one == {k: v for k, v in other.items() if k != 2}


def test_an_arm_that_served_something_else_is_excluded(tmp_path):
    def other(record):
        if record["arm"] == STAGED and record["seed"] == 1:
            record["served"] = record["served"] | {"ru/web": 119, "xx/web": 1}
        return record

    f = findings.analyse(
        write_study(tmp_path, frozen=small(), effects={"reversed": 0.02}, change=other)
    )
    assert set(verdicts(f).values()) == {findings.EXCLUDED}  # it is in all of them
    told = f.arm(STAGED).other
    assert "seed 1 served 119 examples of ru/web, not 120" in told
    assert "1 examples of xx/web, not 0" in told
    pairs = [c for c in f.exploratory if STAGED in (c.arm, c.than)]
    assert pairs
    assert all(c.difference.n == 0 for c in pairs)
    json.dumps(findings.to_json(f), allow_nan=False)


def test_what_is_beyond_the_registration(tmp_path):
    f = findings.analyse(write_study(tmp_path, {"reversed": 0.02}))
    asked = {(c.arm, c.than, c.outcome) for c in f.hypotheses}
    looked = {(c.arm, c.than, c.outcome) for c in f.exploratory}
    assert not asked & (looked | {(b, a, o) for a, b, o in looked})
    # Two sizes of 8 arms, matched within each, in three outcomes.
    assert len(asked) + len(looked) == 2 * 28 * 3
    sizes = {}
    for c in f.sizes:
        sizes.setdefault((c.name, c.outcome), []).append(f.arm(c.arm).levels["size"])
        assert f.arm(c.arm).levels["size"] == f.arm(c.than).levels["size"]
    assert sizes == {
        ("staged − reversed, decay", "others"): ["1M", "3M"],
        ("staged − single, decay", "others"): ["1M", "3M"],
        ("ramped − staged, decay", "others"): ["1M", "3M"],
        ("staged − single, decay", "english"): ["1M", "3M"],
    }
    for c in f.averages:
        assert c.difference.estimate.value == pytest.approx(-0.01)


def test_languages_alone_make_up_the_mean(tmp_path):
    f = findings.analyse(
        write_study(tmp_path, frozen=small(), effects={"reversed": 0.02})
    )
    for name in ("help", "udhr"):
        of = {
            c.language: c.difference.estimate.value
            for c in f.languages
            if (c.name, c.set) == ("order", name)
        }
        assert list(of) == [*LANGUAGES, "others"]
        alone = np.mean([of[k] for k in LANGUAGES if k != "en"])
        assert of["others"] == pytest.approx(alone)


def edited(record, change):
    """A record that somebody changed by hand."""
    match change:
        case "value":
            record["sets"]["udhr"]["ru"] -= 0.5
        case "unit changed":
            record["bits"]["udhr"]["ru"][3] += 90
        case "unit lost":
            record["bits"]["udhr"]["ru"].pop()
        case "status":
            record["status"] = "Done"
        case "seed":
            record["seed"] = str(record["seed"])
        case "not finite":
            record["sets"]["udhr"]["ru"] = None
        case "set":
            del record["bits"]["udhr"]
        case _:
            del record[change]
    return record


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("value", r"says .* for ru in 'udhr', and its units say otherwise"),
        ("unit changed", r"says .* for ru in 'udhr', and its units say otherwise"),
        ("unit lost", r"says .* for ru in 'udhr', and its units say otherwise"),
        *((k, "is damaged") for k in ("status", "seed", "not finite", "set")),
        *((k, "is damaged") for k in ("served", "sets", "bits", "sha256")),
    ],
)
def test_edited_records_are_named(tmp_path, change, said):
    write_study(tmp_path, frozen=small())
    path = tmp_path / f"records/{STAGED}/3.json"
    path.write_text(json.dumps(edited(json.loads(path.read_text()), change)))
    with pytest.raises(UserError, match=said):
        findings.analyse(tmp_path)


def test_a_copy_under_another_seed_is_named(tmp_path):
    write_study(tmp_path, frozen=small())
    record = json.loads((tmp_path / f"records/{STAGED}/3.json").read_text())
    path = tmp_path / f"records/{STAGED}/5.json"
    path.write_text(json.dumps(record | {"seed": 5}))
    with pytest.raises(UserError, match="seeds 3 and 5 are the same"):
        findings.analyse(tmp_path)


@pytest.mark.parametrize("text", [None, "{", '{"other": {}}'])
def test_units_that_are_lost_are_named(tmp_path, text):
    path = write_study(tmp_path, frozen=small()) / "units.json"
    path.unlink()
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=r"units\.json"):
        findings.analyse(tmp_path)


def test_a_study_without_hypotheses_has_a_page(tmp_path):
    frozen = small()
    frozen["study"]["hypotheses"] = []
    frozen["sha256"] = digest({k: frozen[k] for k in ("study", "analysis")})
    f = findings.analyse(write_study(tmp_path, frozen=frozen))
    assert "No hypothesis was registered" in write_page(f, tmp_path).read_text("utf-8")
    assert study_tables.study_text(f)


def test_rules_of_another_release_are_said(tmp_path):
    frozen = small()
    frozen["analysis"]["resamples"] += 1
    frozen["sha256"] = digest({k: frozen[k] for k in ("study", "analysis")})
    f = findings.analyse(write_study(tmp_path, frozen=frozen))
    assert f.other_rules == ["resamples"]
    told = study_tables.study_text(f)
    assert "registered rules of the analysis are not those of this release" in told


def test_nothing_is_done_yet(tmp_path):
    f = findings.analyse(
        write_study(tmp_path, frozen=small(), change=lambda record: None)
    )
    assert f.missing == f.planned
    told = json.dumps(findings.to_json(f), allow_nan=False)
    assert findings.NO_VERDICT in told


def test_an_edited_registration_is_refused(tmp_path):
    write_study(tmp_path, frozen=small())
    path = tmp_path / "registration.json"
    path.write_text(
        path.read_text().replace('"primary": "others"', '"primary": "udhr"')
    )
    with pytest.raises(UserError, match="was edited after it was frozen"):
        findings.analyse(tmp_path)


def test_the_rules_are_part_of_the_hash():
    frozen = registration()
    assert frozen["analysis"] == json.loads(json.dumps(analysis.RULES))
    assert len(ORDERS) * 4 == len(frozen["study"]["arms"])
