"""A study's page and files: whole, under way, with what went wrong."""

import csv
import json

import pytest
from synthetic_study import LANGUAGES, hypothesis, registration, write_study

from gamayun_jax import cli
from gamayun_jax.report import study as report
from gamayun_jax.report import study_tables
from gamayun_jax.study import findings
from gamayun_jax.study.registration import digest


def small():
    """One size and rate: 24 runs."""
    return registration(sizes=("3M",), rates=("decay",))


def page_of(folder):
    f = findings.analyse(folder)
    return f, report.write_study(f, folder).read_text("utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return write_study(folder, {"reversed": 0.02}), *page_of(folder)


def test_verdicts_and_nulls_are_told_alike(whole):
    _, f, page = whole
    for c in f.hypotheses:
        told = study_tables.sentence(f, c)
        assert c.verdict.upper() in told
        assert ("80 % power" in told) == (c.verdict == "not decided")
        # A mark beside the words says no more than they do.
        marked = {"supported": "better", "contradicted": "worse"}.get(c.verdict, "")
        assert f'<td class="{marked}" data-v="">{c.verdict}<' in page
    notes = f.study["notes"]
    for text in ("SUPPORTED", "NOT DECIDED", f.frozen["sha256"], "Exploratory", *notes):
        assert text in page
    assert page.index("Verdicts") < page.index("Exploratory")
    assert "Under way" not in page
    assert "Not recorded" not in page


def test_every_arm_is_a_picture_and_every_language_a_row(whole):
    page = whole[2]
    # Two sizes are one picture each; shares of six sources in each.
    assert page.count('aria-label="Curriculum of ') == 8
    assert page.count("opacity:0.9") == 8 * 6
    assert page.count('aria-label="Learning curves by language') == 1
    for title in ("help", "udhr"):
        assert f"Differences by language on {title}" in page


def test_files_have_what_the_page_has(whole):
    folder, f, _ = whole
    out = folder / "report"
    assert json.loads((out / "results.json").read_text()) == json.loads(
        json.dumps(findings.to_json(f))
    )
    runs = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert len(runs) == f.planned
    assert {"arm", "seed", "status", "others", "udhr/tr"} <= runs[0].keys()
    rows = list(csv.DictReader((out / "comparisons.csv").read_text().splitlines()))
    kinds = [r["kind"] for r in rows]
    assert kinds.count("registered") == len(f.hypotheses)
    assert kinds.count("exploratory") == len(f.exploratory)
    assert (out / "results.txt").read_text() == study_tables.study_text(f) + "\n"


def test_the_same_records_give_the_same_page(whole):
    folder, _, page = whole
    assert page_of(folder)[1] == page


def test_a_study_under_way_says_so_and_judges_nothing(tmp_path):
    def few(record):
        return record if record["seed"] < 2 else None

    write_study(tmp_path, {"reversed": 0.05}, small(), change=few, pictures=False)
    f, page = page_of(tmp_path)
    assert "Under way: 8 of 24 runs" in page
    assert "SUPPORTED" not in page
    assert "supported" not in study_tables.study_text(f)
    assert "Not recorded in this study: curricula.json" in page


def test_a_study_without_any_run_has_a_page(tmp_path):
    write_study(tmp_path, frozen=small(), change=lambda record: None)
    assert "Under way: 0 of 24 runs" in page_of(tmp_path)[1]


def test_what_went_wrong_stands_on_top(tmp_path):
    def bad(record):
        if (record["arm"], record["seed"]) == ("3M-single-decay", 3):
            head = {k: record[k] for k in ("arm", "seed", "sha256")}
            return head | {"status": "diverged", "why": "loss is NaN at step 7"}
        if record["arm"] == "3M-ramped-decay":
            record["served"] = record["served"] | {"tr/web": 7}
        return record

    write_study(tmp_path, frozen=small(), change=bad)
    f, page = page_of(tmp_path)
    top = page[: page.index("Verdicts</h2>")]
    assert "seed 3 DIVERGED" in top
    assert "loss is NaN at step 7" in top
    assert "3M-ramped-decay is EXCLUDED" in top
    assert "served 7 examples of tr/web, not 120" in top
    assert "these say that it served anything else: 3M-ramped-decay" in page
    text = study_tables.study_text(f)
    assert "Left out for divergence: seeds 3." in text
    assert "EXCLUDED" in text


def test_a_mean_that_lacks_languages_says_so(tmp_path, whole):
    """On the page, in the tables and in the terminal's text; and only there."""
    frozen = small()
    for arm in frozen["study"]["arms"]:
        arm["config"]["languages"].append("ko")
    frozen["sha256"] = digest({k: frozen[k] for k in ("study", "analysis")})
    write_study(tmp_path, frozen=frozen)
    f, page = page_of(tmp_path)
    others = ", ".join(k for k in LANGUAGES if k != "en")
    told = f"Outcome udhr: udhr has no ko: the mean of {others}."
    assert page.count(told) == 2  # beside the verdicts and beneath the table
    assert told in study_tables.study_text(f)
    heads = study_tables.noise_table(f).heads
    assert [h.endswith("(not of all languages)") for h in heads[2:]] == [
        True,
        True,
        False,
    ]
    assert "not of all languages" not in whole[2]
    assert "has no" not in study_tables.study_text(whole[1])


def test_two_arms_without_sizes_and_without_twins(tmp_path):
    """A study need not have the factor size, matched arms or several outcomes."""
    frozen = registration(sizes=("1M",), rates=("decay",), seeds=range(3))
    study = frozen["study"]
    study["arms"] = study["arms"][:2]
    for arm in study["arms"]:
        del arm["levels"]["size"], arm["levels"]["rate"]
    study |= {
        "outcomes": study["outcomes"][:1], "primary": "udhr", "matched": None,
        "hypotheses": [hypothesis("h", {"order": "staged"}, {"order": "single"})],
    }  # fmt: skip
    frozen["sha256"] = digest({k: frozen[k] for k in ("study", "analysis")})
    write_study(tmp_path, frozen=frozen)
    f, page = page_of(tmp_path)
    assert f.exploratory == []
    assert f.sizes == []
    assert "Effect against size" not in page
    assert "Arms are not matched" in page


def test_names_are_text(tmp_path):
    frozen = registration(sizes=("1M",), rates=("decay",), seeds=range(2))
    study = frozen["study"]
    study |= {"question": "<b>why?</b>", "notes": ["<script>alert(1)</script>"]}
    study["hypotheses"] = study["hypotheses"][:1]
    study["hypotheses"][0]["claim"] = "<i>it</i> helps"
    frozen["sha256"] = digest({k: frozen[k] for k in ("study", "analysis")})
    page = page_of(write_study(tmp_path, frozen=frozen))[1]
    for text in ("<b>why", "<script>alert", "<i>it"):
        assert text not in page


def test_the_report_command_takes_a_study(whole, capsys):
    folder, f, _ = whole
    assert not cli.main(["report", str(folder)])
    told = capsys.readouterr().out
    assert study_tables.study_text(f) in told
    assert told.strip().endswith("report/index.html")
    assert cli.main(["report", str(folder), str(folder)]) == 2
    assert "a study's folder goes alone" in capsys.readouterr().err
