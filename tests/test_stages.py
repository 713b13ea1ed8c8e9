"""stages.py: changes over a stage, against scipy-free references and known truths."""

import json
import math

import numpy as np
import pytest

from gamayun_jax import cli, evaluate, report, runs, stages

LANGUAGES = ("en", "ru", "tr")


def test_holm():
    p = [0.01, 0.04, 0.03, 0.005]
    assert stages.holm(p) == [True, False, False, True]  # Holm 1979, worked by hand
    assert stages.holm([0.2, 0.001, 0.2]) == [False, True, False]
    assert stages.holm([]) == []


def test_draws():
    ids = [f"u{i}" for i in range(50)]
    times = stages.draws(ids)
    assert times.shape == (stages.DRAWS, 50)
    assert (times.sum(1) == 50).all()
    assert (times == stages.draws(ids)).all()
    assert (times != stages.draws([*ids[1:], "x"])).any()


def test_paired_error_is_the_analytic_one():
    """Of a mean: the deviation of differences over sqrt(n), far below the unpaired."""
    rng = np.random.default_rng(0)
    base, gain = rng.normal(2.0, 1.0, 400), rng.normal(0.05, 0.1, 400)

    def items(values):
        return {
            str(i): {"bits": 8 * v, "bytes": 8, "correct": {"f1": v}}
            for i, v in enumerate(values)
        }

    for metric in ("bits_per_byte", "f1"):
        a, b, delta = stages.paired(items(base), items(base + gain), metric)
        assert b - a == pytest.approx(gain.mean())
        assert delta.mean() == pytest.approx(gain.mean(), abs=1e-3)
        assert delta.std() == pytest.approx(gain.std() / math.sqrt(400), rel=0.08)
    few = dict(list(items(base).items())[:300])
    assert stages.paired(few, items(base), "f1") is None  # another test by now


def test_false_alarms_are_rare():
    """No language changes: a mark in any of 6 in no more than 5 % of trials."""
    rng = np.random.default_rng(1)
    alarms, trials, n = 0, 40, 100
    for trial in range(trials):
        p = []
        for _ in range(6):
            a, b = rng.normal(size=(2, n))
            ids = [f"{trial}/{i}" for i in range(n)]
            times = stages.draws(ids, 200)
            delta = (times @ (b - a)) / n
            p.append(stages.two_sided(float((b - a).mean()), float(delta.std())))
        alarms += any(stages.holm(p))
    assert alarms <= 8  # 2 expected; P(more than 8) < 0.1 %


def rows_of(test, language, shift, rng, base, fall):
    found = []
    for i, x in enumerate(base):
        key = {"id": f"{test}{i}", "language": language}
        if test == "heldout-udhr":
            bits = 100 * (x + fall * shift) + rng.normal(0, 1)
            found.append(key | {"bits": bits, "bytes": 50, "tokens": 20})
        else:
            right = float(rng.random() < 0.5 - 0.4 * fall * shift)
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
                value, error = evaluate.ratio(bits, sizes)
                part[k] = {"bits_per_byte": value, "bits_per_byte_se": error}
            text = "".join(json.dumps(r) + "\n" for r in lines)
            (out / f"{test}.jsonl").write_text(text)
        record["sets"] = {"udhr": {"languages": part, "macro": {"bits_per_byte": 5.9}}}
        quiz = {"metric": "norm", "languages": task, "macro": {"norm": 0.5}}
        record["tasks"] = {"quiz": quiz}
        (tmp_path / "eval" / f"{step}.json").write_text(json.dumps(record))
    return tmp_path


def test_gain_and_forgetting(folder, capfd):
    first, second = stages.boundaries(folder, runs.read_run(folder))
    assert (first.stage, second.before, second.after[:6]) == (
        "align", "end of align", "end of"
    )  # fmt: skip
    assert {c.verdict for c in first.changes if c.language in LANGUAGES} == {"same"}
    found = {(c.test, c.language): c for c in second.changes}
    for test, sign in (("udhr", 1), ("quiz", -1)):
        verdicts = [found[test, k].verdict for k in LANGUAGES]
        assert verdicts == ["same", "worse", "better"]
        ru = found[test, "ru"]
        assert ru.paired
        assert ru.low < ru.delta < ru.high
        assert sign * ru.delta > 0
    assert found["udhr", "ru"].delta == pytest.approx(0.6, abs=0.01)
    macro = found["udhr", "macro"]
    mean = np.mean([found["udhr", k].delta for k in LANGUAGES])
    assert macro.delta == pytest.approx(mean)
    assert cli.main(["report", str(folder), "--out", str(folder / "out")]) == 0
    text = capfd.readouterr().out
    assert "change in stage align (from start to end of align)" in text
    line = next(x for x in text.split("from end of align")[1].split("\n") if "tr" in x)
    assert float(line.split()[1].replace("−", "-")) == pytest.approx(-0.6, abs=0.02)
    assert line.split()[2] == "+"
    page = (folder / "out/index.html").read_text()
    assert "What stage “&lt;b&gt;” changed" in page
    assert "<b>”" not in page
    assert "unpaired" not in page


def test_without_items_the_errors_are_combined(folder):
    whole = stages.boundaries(folder, runs.read_run(folder))[1].changes
    (folder / "eval/13.items/heldout-udhr.jsonl").write_text('{"id": 1}\nbroken')
    (folder / "eval/13.items/quiz.jsonl").unlink()
    found = stages.boundaries(folder, runs.read_run(folder))[1].changes
    old = {(c.test, c.language): c for c in whole}
    assert found
    assert not any(c.paired for c in found)
    for c in found:
        before = old[c.test, c.language]
        assert c.delta == pytest.approx(before.delta, abs=1e-9)
        assert c.high - c.low > 0.8 * (before.high - before.low)
    wide = next(c for c in found if (c.test, c.language) == ("udhr", "ru"))
    tight = old["udhr", "ru"]
    assert wide.high - wide.low > 5 * (tight.high - tight.low)
    assert "unpaired" in report.write_report([folder], folder / "out").read_text()


def test_one_evaluation_has_no_boundary(folder):
    for step in (7, 13):
        (folder / f"eval/{step}.json").unlink()
    assert stages.stage_table(folder, runs.read_run(folder)) == ""
