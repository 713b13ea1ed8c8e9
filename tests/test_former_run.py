"""What a former version wrote still opens, goes on and is reported.

fixtures/former_run.tar.xz holds a corpus and a run of two stages of 10 steps, killed
after the checkpoint at step 14, and what the same run gave when nothing killed it;
fixtures/make_former_run.py made it with the code of commit c7e6783.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import started

from gamayun_jax import config as c
from gamayun_jax import train
from gamayun_jax.evaluate import stored_model
from gamayun_jax.report import report, scores
from gamayun_jax.training import checkpoint


@pytest.fixture
def former(tmp_path, monkeypatch):
    """A folder with `corpus`, `run` and `finished.json`; the current one."""
    with tarfile.open(Path(__file__).parent / "fixtures/former_run.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder):
    """The training records by step."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").split("\n")
    return {r["step"]: r for r in map(json.loads, filter(None, lines))}


def without_time(record):
    return {k: v for k, v in record.items() if k != "time"}


def nll_sum(rows, language, after):
    """Nats of a language, summed over the records after a step."""
    found = [r["languages"][language] for step, r in rows.items() if step > after]
    return sum(r["nll"] * r["targets"] for r in found)


def test_a_former_run_goes_on_and_ends_as_it_would_have(former):
    cfg = c.from_json(Path("run/config.json").read_text("utf-8"), "run/config.json")
    before = records(former / "run")
    said = []
    assert train.train(cfg, Path("run"), log=said.append) == 0
    assert any("going on from step 14 of 20" in line for line in said)
    # It has no hashes of its corpus; the checkpoints that it makes now do.
    assert sum("cannot be verified" in line for line in said) == 1
    # What its mixtures meant stays.
    store = checkpoint.Checkpoints(former / "run/checkpoints", read_only=True)
    assert store.meta(20).rest_of == "sources"
    store.close()
    said.clear()
    assert train.train(cfg, Path("run"), log=said.append) == 0
    assert not any("cannot be verified" in line for line in said)
    after = records(former / "run")
    expected_run = json.loads(Path("finished.json").read_text("utf-8"))
    expected = {r["step"]: r for r in expected_run["records"]}
    for step in (s for s in expected if s < 14):  # not made again
        assert without_time(after[step]) == without_time(before[step])
    # Records begin with a stage now, so later ones end elsewhere: their sums are alike.
    assert list(after)[-1] == list(expected)[-1] == 20
    assert after[20]["sources"] == expected[20]["sources"]  # the same data
    assert after[20]["lr"] == pytest.approx(expected[20]["lr"], rel=1e-4)
    for language in cfg.languages:
        new, old = (nll_sum(rows, language, 12) for rows in (after, expected))
        assert new == pytest.approx(old, rel=1e-4)
    macro = json.loads(Path("run/eval/20.json").read_text("utf-8"))["sets"]["udhr"]
    np.testing.assert_allclose(
        macro["macro"]["bits_per_byte"],
        expected_run["eval"]["sets"]["udhr"]["macro"]["bits_per_byte"],
        rtol=1e-4,
    )


def test_a_former_run_may_begin_an_average(former):
    """Its checkpoints have none."""
    cfg = c.from_json(Path("run/config.json").read_text("utf-8"), "run/config.json")
    assert cfg.optimizer.ema_tokens == 0
    optimizer = dataclasses.replace(cfg.optimizer, ema_tokens=10**6)
    run = started(dataclasses.replace(cfg, optimizer=optimizer), Path("run"))
    assert (run.step, int(run.state.ema["updates"])) == (14, 0)
    assert any("ema_tokens) begins at step 14" in text for text in run.log)


def test_a_former_run_is_reported_and_evaluated(former):
    page = report.write_report([Path("run")], Path("page"))
    assert "former" in page.read_text("utf-8")
    assert "udhr" in scores.run_text(Path("run"))
    result = stored_model.evaluate_heldout(Path("run/checkpoints/10"))[0]
    recorded = json.loads(Path("run/eval/10.json").read_text("utf-8"))
    for language, row in recorded["sets"]["udhr"]["languages"].items():
        new = result["sets"]["udhr"]["languages"][language]
        np.testing.assert_allclose(
            new["bits_per_byte"], row["bits_per_byte"], rtol=1e-4
        )
