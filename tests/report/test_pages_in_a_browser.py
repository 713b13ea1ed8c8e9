"""Every kind of page in a real browser, as wide as a phone and as a desktop."""

import pytest
from browser import check, needs_browser
from made_up_run import records, write_run
from synthetic_study import registration, write_study

from gamayun_jax.report import report
from gamayun_jax.report import study as study_page
from gamayun_jax.study import findings

pytestmark = [needs_browser, pytest.mark.slow]


def test_the_page_of_a_run(tmp_path):
    run = write_run(tmp_path / "run", records(every=20, evals=(0, 400, 800, 1000)))
    found = check(report.write_report([run], tmp_path / "out"), tmp_path)
    assert all(view["drawn"] > 5 for view in found)


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
