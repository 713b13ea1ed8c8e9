"""changes.py: changes over a stage, against known truths."""

import dataclasses
import json

import numpy as np
import pytest

from gamayun_jax import cli
from gamayun_jax.evaluate import paired, standard_errors
from gamayun_jax.report import changes, charts, formats, html, read_run, report

LANGUAGES = ("en", "ru", "tr")


def rows_of(test, language, shift, rng, base, fall):
    found = []
    for i, x in enumerate(base):
        key = {"id": f"{test}{i}", "language": language}
        if test == "heldout-udhr":
            bits = 100 * (x + fall * shift) + rng.normal(0, 1)
            found.append(key | {"bits": bits, "bytes": 50, "tokens": 20})
        else:
            right = float(rng.random() < 0.5 - 0.7 * fall * shift)
            found.append(key | {"correct": {"norm": right}})
    return found


@pytest.fixture
def folder(tmp_path):
    """Stage two helps Turkish, hurts Russian, and leaves English as it was."""
    rng = np.random.default_rng(3)
    shift = {"en": 0.0, "ru": 0.3, "tr": -0.3}
    (tmp_path / "eval").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"languages": LANGUAGES}))
    base = {k: rng.uniform(1, 5, 300) for k in LANGUAGES}
    steps = ((0, "start", ""), (7, "end of align", "align"), (13, "end of <b>", "<b>"))
    for step, label, stage in steps:
        out = tmp_path / "eval" / f"{step}.items"
        out.mkdir()
        record = {"step": step, "tokens": step * 10, "stage": stage, "label": label}
        part, task = {}, {}
        for test in ("heldout-udhr", "quiz"):
            lines = []
            for k in LANGUAGES:
                fall = 1.0 if step == 13 else 0.0
                rows = rows_of(test, k, shift[k], rng, base[k], fall)
                lines += rows
                if test == "quiz":
                    task[k] = {"norm": np.mean([r["correct"]["norm"] for r in rows])}
                    task[k]["norm_se"] = 0.03
                    continue
                bits, sizes = (
                    np.array([r[x] for r in rows]) for x in ("bits", "bytes")
                )
                value, error = standard_errors.ratio(bits, sizes)
                part[k] = {"bits_per_byte": value, "bits_per_byte_se": error}
            text = "".join(json.dumps(r) + "\n" for r in lines)
            (out / f"{test}.jsonl").write_text(text)
        record["sets"] = {"udhr": {"languages": part, "macro": {"bits_per_byte": 5.9}}}
        quiz = {"metric": "norm", "languages": task, "macro": {"norm": 0.5}}
        record["tasks"] = {"quiz": quiz}
        (tmp_path / "eval" / f"{step}.json").write_text(json.dumps(record))
    return tmp_path


def test_gain_and_forgetting(folder, capfd):
    first, second = changes.boundaries(read_run.read_run(folder))
    assert (first.stage, second.before, second.after[:6]) == (
        "align", "end of align", "end of"
    )  # fmt: skip
    assert {c.verdict for c in first.changes if c.language in LANGUAGES} == {"same"}
    found = {(c.name, c.language): c for c in second.changes}
    for test, sign in (("udhr", 1), ("quiz", -1)):
        verdicts = [found[test, k].verdict for k in LANGUAGES]
        assert verdicts == ["same", "worse", "better"]
        ru = found[test, "ru"]
        assert ru.paired
        assert ru.estimate.low < ru.estimate.value < ru.estimate.high
        assert sign * ru.estimate.value > 0
    assert found["udhr", "ru"].estimate.value == pytest.approx(0.6, abs=0.01)
    macro = found["udhr", "macro"]
    mean = np.mean([found["udhr", k].estimate.value for k in LANGUAGES])
    assert macro.estimate.value == pytest.approx(mean)
    assert cli.main(["report", str(folder), "--out", str(folder / "out")]) == 0
    text = capfd.readouterr().out
    assert "change in stage align (from start to end of align)" in text
    line = next(x for x in text.split("from end of align")[1].split("\n") if "tr" in x)
    _, before, _, after, change, mark = line.replace("−", "-").split()[:6]
    assert float(change) == pytest.approx(-0.6, abs=0.02)
    assert float(after) - float(before) == pytest.approx(float(change), abs=0.002)
    assert mark == "+"
    page = (folder / "out/index.html").read_text()
    assert "Before and after stage “&lt;b&gt;”" in page
    assert "<b>”" not in page
    assert "unpaired" not in page


def width(change):
    return change.estimate.high - change.estimate.low


def test_without_items_the_errors_are_combined(folder):
    whole = changes.boundaries(read_run.read_run(folder))[1].changes
    (folder / "eval/13.items/heldout-udhr.jsonl").write_text('{"id": 1}\nbroken')
    (folder / "eval/13.items/quiz.jsonl").unlink()
    found = changes.boundaries(read_run.read_run(folder))[1].changes
    old = {(c.name, c.language): c for c in whole}
    assert found
    assert not any(c.paired for c in found)
    for c in found:
        if c.language == "macro":  # recorded without an error: no interval, no mark
            assert (c.estimate.low, c.verdict) == (None, "same")
            continue
        before = old[c.name, c.language]
        assert c.estimate.value == pytest.approx(before.estimate.value, abs=1e-9)
        assert width(c) > 0.8 * width(before)
    wide = next(c for c in found if (c.name, c.language) == ("udhr", "ru"))
    assert width(wide) > 5 * width(old["udhr", "ru"])
    assert "unpaired" in report.write_report([folder], folder / "out").read_text()


def test_a_damaged_item_is_named_and_costs_no_other(folder, capfd):
    whole = changes.boundaries(read_run.read_run(folder))[1]
    path = folder / "eval/13.items/quiz.jsonl"
    path.write_text(path.read_text() + '{"id": 7}\n"torn')
    found = changes.boundaries(read_run.read_run(folder))[1]
    assert found.changes == whole.changes
    named = [f"eval/13.items/quiz.jsonl, line {n}" for n in (901, 902)]
    assert (whole.damaged, found.damaged) == ([], named)
    assert cli.main(["report", str(folder), "--out", str(folder / "out")]) == 0
    said = f"damaged lines of items left out: 2 ({'; '.join(named)})"
    assert said in capfd.readouterr().out
    assert said in (folder / "out/index.html").read_text()


def test_one_page_says_one_thing(folder):
    """Tables, figures and their numbers agree: a change has one verdict everywhere."""
    page = report.write_report([folder], folder / "out").read_text()
    run = read_run.read_run(folder)
    for boundary in changes.boundaries(run):
        for c in boundary.changes:
            # In the stage's table, and without an interval in the held-out set's.
            whole, both = html.block("td", c.cell()), c.test == "heldout-udhr"
            assert whole in page, (boundary.stage, c.language)
            assert page.count(whole.split("<small>")[0]) == 1 + both
            # Solid dots are verdicts, faint ones noise; a tooltip says which.
            dot, word = c.dot(), changes.VERDICTS[c.verdict]
            assert (dot.look == "faint") == (c.verdict == "same")
            told = charts.Panel("", form=None).told(c.language, dot)
            assert f"change ({word})" in told
            if both:
                last = boundary is changes.boundaries(run)[-1]
                assert page.count(f"<title>{told}</title>") >= 1 + last


def test_a_change_of_a_share_is_told_in_percent_with_a_digit_that_is_not_0():
    e = paired.Estimate(0.0004, 0.0001, 0.0007, 0.01)
    c = changes.Change("quiz", "norm", "en", 0.5, 0.5004, e, "better", True)
    assert (c.arrow(), c.cell().text, c.cell().note) == (
        "50.0 → 50.0", "+0.04", "+0.01 … +0.07"
    )  # fmt: skip
    bits = dataclasses.replace(c, metric=changes.BITS)
    assert (bits.arrow(), bits.cell().text) == ("0.500 → 0.500", "+0.0004")
    noise = dataclasses.replace(bits, verdict="same")
    assert noise.cell().text == "+0.000"


def test_a_task_called_as_a_held_out_set_is_another_test(folder):
    for step in (7, 13):
        path = folder / f"eval/{step}.json"
        record = json.loads(path.read_text())
        rows = record["sets"]["udhr"]
        record["tasks"]["udhr"] = {"metric": "bits_per_byte", **rows}
        path.write_text(json.dumps(record))
    tests = changes.by_test(changes.boundaries(read_run.read_run(folder))[1].changes)
    assert [name for name, _ in tests] == ["udhr", "quiz", "udhr (task)"]


def test_one_evaluation_has_no_boundary(folder):
    for step in (7, 13):
        (folder / f"eval/{step}.json").unlink()
    assert changes.stage_text(read_run.read_run(folder)) == ""


def test_an_interval_shows_on_which_side_of_0_it_is():
    def text(*ends):
        return formats.interval_text(paired.Estimate(*ends))

    assert text(0.01, 0.0002, 0.02, 0.04) == "+0.0002 … +0.0200"
    assert text(0.0, -0.1, 0.1, 1.0) == "−0.100 … +0.100"
    assert text(0.5, None, None, 1.0) == "–"


def test_metrics_have_names_for_people():
    assert formats.metric_name("bits_per_byte") == "bits per byte"
    assert formats.metric_name("pmi") == "accuracy (pmi)"
    assert formats.metric_name("exact") == "exact"
