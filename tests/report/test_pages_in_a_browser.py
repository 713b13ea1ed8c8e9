"""Every kind of page in a real browser, as wide as a phone and as a desktop."""

import json

import pytest
from browser import check, needs_browser
from made_up_run import records, with_samples, without_english, write_run
from synthetic_study import registration, write_study

from gamayun_jax.report import compare, eval_page, report
from gamayun_jax.report import study as study_page
from gamayun_jax.study import findings

pytestmark = [needs_browser, pytest.mark.slow]


def test_the_page_of_a_run(tmp_path):
    run = write_run(tmp_path / "run", records(every=20, evals=(0, 400, 800, 1000)))
    with_samples(run)
    found = check(report.write_report([run], tmp_path / "out"), tmp_path)
    assert all(view["drawn"] > 5 for view in found)


def test_the_page_of_three_stages_without_english_with_an_average(tmp_path):
    files = without_english(records(every=50, evals=(0, 400, 800, 1000)))
    files["eval/400.json"] |= {"label": "end of align", "stage": "align"}
    files["eval/800.json"] |= {"label": "end of middle", "stage": "middle"}
    files["eval/1000.json"]["ema"] = {"sets": files["eval/1000.json"]["sets"]}
    run = write_run(tmp_path / "run", files)
    check(report.write_report([run], tmp_path / "out"), tmp_path)


def test_the_pages_of_an_evaluation_and_a_comparison(tmp_path):
    run = with_samples(write_run(tmp_path / "run", records(every=50)))
    record = json.loads((run / "eval/1000.json").read_text())
    result = record | {
        "model": {"parameters": 1000, "path": "/m", "tokenizer": "t"}, "window": 128,
        "versions": {"jax": "1"}, "date": "2026-01-01", "label": "a model",
    }  # fmt: skip
    found = check(eval_page.write_eval_page(result, tmp_path / "eval"), tmp_path)
    assert [view["drawn"] for view in found] == [3, 3]  # two sets and the tasks
    task = record["tasks"]["names"] | {"hash": "h", "prompt_hash": "p"}
    lines = (run / "eval/1000.items/names.jsonl").read_text().splitlines()
    items = {"names": [json.loads(line) for line in lines]}
    both = [(result | {"tasks": {"names": task}, "label": k}, items) for k in "ab"]
    page = compare.write_comparison(compare.compare(both), tmp_path / "compare")
    check(page, tmp_path)


def test_the_page_of_several_runs(tmp_path):
    runs = [
        write_run(tmp_path / f"a run with a rather long name {n}", records(q, every=20))
        for n, q in enumerate((2.4, 2.6))
    ]
    check(report.write_report(runs, tmp_path / "out"), tmp_path)


def test_the_page_of_a_study(tmp_path):
    folder = write_study(
        tmp_path / "study", {"reversed": 0.02}, registration(sizes=("3M",))
    )
    check(study_page.write_study(findings.analyse(folder), folder), tmp_path)
