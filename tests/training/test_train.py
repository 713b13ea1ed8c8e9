"""The loop through real files: stages, resume, transition, refusals."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import small_corpora
from conftest import slow_but
from jax.profiler import ProfileData

from gamayun_jax import cli, train
from gamayun_jax.config import (
    MixtureConfig,
    TokenWeightConfig,
    TransitionConfig,
    UserError,
    to_json,
)
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.files import file_sha256
from gamayun_jax.data.ledger import uncounted
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.data.records import FlatShard
from gamayun_jax.data.token_weights import build_token_weights
from gamayun_jax.interop.huggingface import export_hf
from gamayun_jax.interop.model_card import exposure_of
from gamayun_jax.report.exposure import ledger_of
from gamayun_jax.report.read_run import read_run
from gamayun_jax.report.report import write_report
from gamayun_jax.training import checkpoint, cluster, meters, signals
from gamayun_jax.training.compatibility import check_corpus
from gamayun_jax.training.lineage import load_origin, share_points
from gamayun_jax.training.meters import MetricAccumulator
from gamayun_jax.training.run_folder import RunFolder
from gamayun_jax.training.spool import BadRecordLog, Spool
from gamayun_jax.training.step import abstract_state


def quiet(text):
    pass


def state_of(run, cfg, step):
    """The saved state as host arrays."""
    from gamayun_jax.model.sharding import make_mesh

    store = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    state = store.restore(step, abstract_state(cfg, make_mesh(cfg.mesh)))
    store.close()
    return jax.tree.leaves(jax.device_get(state))


def meta_at(run, step):
    """The meta of a run's checkpoint."""
    store = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    with contextlib.closing(store):
        return store.meta(step)


def records(run):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return lines


def evaluations(run):
    folder = run / "eval"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_text() for p in files}


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """A run of both stages that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert train.train(config, run, log=quiet) == 0
    return run


def stop_at(step):
    """A log function that sends SIGTERM once the given record is written."""

    def log(text):
        if f"step {step}/" in text and "eval" not in text:
            os.kill(os.getpid(), signal.SIGTERM)

    return log


def busy(*numbers, log=quiet):
    """Get signals during a long call of C, for which Python's handlers wait, as for the
    compiler; whether a stop is agreed on, and when the call ended."""

    def send():
        for number in numbers:
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    def work(rounds):
        begin = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
        return time.monotonic() - begin

    rounds = int(1.2 / work(50_000) * 50_000)  # seconds of work
    with signals.StopSignal(log) as stop:
        threading.Thread(target=send).start()
        work(rounds)
        return stop.agreed(1), time.monotonic()


def test_a_stop_is_answered_while_the_compiler_runs():
    said = []
    stops, end = busy(signal.SIGINT, log=lambda x: said.append((x, time.monotonic())))
    ((text, when),) = said
    assert stops
    assert text == "stopping: saving after this step; again to quit now"
    assert when < end - 0.2


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_quits_while_the_compiler_runs(monkeypatch, second):
    left = []
    monkeypatch.setattr(signals.StopSignal, "PATIENCE", 0.1)
    monkeypatch.setattr(
        signals.os, "_exit", lambda status: left.append((status, time.monotonic()))
    )
    with pytest.raises(KeyboardInterrupt):
        busy(signal.SIGINT, second)
    end = time.monotonic()
    ((status, when),) = left
    assert status == 130
    assert when < end - 0.1


def test_signals_are_as_before_after_a_run():
    former = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with signals.StopSignal(quiet):
        pass
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == former
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_signals_are_left_alone():
    """A notebook or a server may train in a thread of its own."""
    former = signal.getsignal(signal.SIGTERM)

    def run():
        with signals.StopSignal(quiet) as stop:
            return stop.agreed(1), signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == (False, former)


def test_a_run_records_itself(straight, config):
    found = records(straight)
    assert [r["step"] for r in found] == [4, 7, 11, 13]
    assert [r["stage"] for r in found] == ["align", "align", "enrich", "enrich"]
    lineage = json.loads((straight / "lineage.json").read_text())
    assert [c["step"] for c in lineage["checkpoints"]] == [3, 6, 7, 9, 12, 13]
    assert lineage["stages"][1]["start_tokens"] == 7 * 8 * 64
    labels = [
        json.loads(text)["label"]
        for name, text in evaluations(straight).items()
        if name.endswith(".json")
    ]
    assert sorted(labels) == ["end of align", "end of enrich", "start"]


def test_shares_read_back_from_the_records_are_the_curriculum_s(
    straight, config, corpus
):
    """Counted on the device from what was trained on, not from the plan."""
    plan = make_data_plan(config, corpus)
    for stage in ("align", "enrich"):
        steps = [r["step"] for r in records(straight) if r["stage"] == stage]
        first = 0 if stage == "align" else 7
        served, before = plan.served(steps[-1]), plan.served(first)
        for language in config.languages:
            got = sum(
                r["languages"][language]["tokens"]
                for r in records(straight)
                if r["stage"] == stage
            )
            name = f"{language}/help"
            assert got == (served[name] - before[name]) * 64
    align = plan.served(7)
    assert [align[f"{k}/help"] for k in ("en", "ru", "tr")] == pytest.approx(
        [22.4, 22.4, 11.2], abs=1
    )


def test_the_ledger_is_the_plan_and_what_the_steps_counted(
    straight, config, corpus, tmp_path
):
    """At a step between records: the records' tokens by language, and the checkpoint's
    of the steps since, are the plan's; at the run's end, so is the report's ledger."""
    plan = make_data_plan(config, corpus)
    for step in (6, 9, 12, 13):
        meta = meta_at(straight, step)
        found = exposure_of(meta, straight)
        served = plan.served(step)
        assert uncounted(found) == {}
        for language in config.languages:
            row, source = found["languages"][language], f"{language}/help"
            assert row["counted"]["tokens"] == served[source] * 64
            examples = corpus.examples(64)[source]
            assert found["sources"][source]["served"] == row["served"]
            assert row["served"]["examples"] == served[source]
            assert row["planned"]["examples"] == plan.served(13)[source]
            assert row["served"]["epochs"] == served[source] / examples
            assert row["served"]["targets"] == pytest.approx(
                row["counted"]["targets"], rel=0.1
            )
        assert found["all"]["served"]["tokens"] == step * 8 * 64
    assert ledger_of(read_run(straight)) == found
    write_report([straight], tmp_path)
    told = json.loads((tmp_path / "exposure.json").read_text())
    assert told == {"straight": found}
    export_hf(straight, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "exposure.json").read_text()) == found
    card = (tmp_path / "hf" / "README.md").read_text()
    n = found["sources"]["en/help"]["served"]["examples"]
    assert f"| en/help | {n} | {n} | {n * 64:,} |" in card
    assert "| language | align, tokens | align, planned | align, achieved |" in card
    missing = exposure_of(meta, tmp_path)  # the records are gone
    assert set(uncounted(missing)) == set(config.languages)
    assert missing["all"] == found["all"]


def test_the_records_tell_what_the_weights_did(straight, config, corpus):
    """Against the batches themselves, by the tables of each stage."""
    plan, expected = make_data_plan(config, corpus), {}
    data = LocalBatches(config, corpus, plan, np.arange(8))
    for stage, steps in (("align", range(7)), ("enrich", range(7, 13))):
        k = [s.name for s in config.stages].index(stage)
        shares = plan.language_shares(config, k)
        by_language, by_token = build_token_weights(config, corpus, shares, k)
        of = np.zeros(3)
        squares = targets = 0.0
        for step in steps:
            b = data[step]
            w = b["loss_mask"] * by_language[b["language"]] * by_token[b["targets"]]
            of += np.bincount(b["language"].ravel(), w.ravel(), 3)
            squares, targets = squares + (w**2).sum(), targets + b["loss_mask"].sum()
        expected[stage] = of / of.sum(), of.sum() ** 2 / squares / targets
    stages = ledger_of(read_run(straight))["stages"]
    assert [s["stage"] for s in stages] == list(expected)
    for stage in stages:
        shares, effective = expected[stage["stage"]]
        got = [row["achieved"] for row in stage["languages"].values()]
        np.testing.assert_allclose(got, shares, rtol=1e-5)
        assert stage["effective_share"] == pytest.approx(effective, rel=1e-5)
    assert stages[0]["effective_share"] < 0.9  # bytes
    assert stages[1]["effective_share"] == pytest.approx(1.0)  # none


def test_a_former_checkpoint_s_sums_go_on_without_weights():
    """What they lack counts from there, with a number of targets of its own."""
    metrics = {
        "loss_sum": 6.0, "target_count": 3.0, "grad_norm": 1.0, "skipped": 0,
        "squared_weights": 5.0, "learning_rate": 0.1,
        "languages": {
            "nll": [6.0, 0.0], "targets": [3.0, 0.0], "tokens": [4.0, 0.0],
            "weights": [3.0, 0.0],
        },
    }  # fmt: skip
    new = MetricAccumulator(2)
    new.add(metrics)
    saved = json.loads(json.dumps(new.to_json()))
    for name in ("weighted_targets", "squared_weights"):
        del saved["sums"][name]
    del saved["languages"]["weights"]
    gone_on = MetricAccumulator(2, saved)
    gone_on.add(metrics)
    record = gone_on.record(("en", "ru"))
    assert record["languages"]["en"]["targets"] == 6
    assert record["objective"] == new.record(("en", "ru"))["objective"]
    assert record["objective"]["effective_share"] == pytest.approx(9 / 15)


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 7, 11])
def test_resume_is_bit_exact(step, straight, config, tmp_path):
    """Stopped inside stage 1, at the boundary, inside stage 2."""
    run = tmp_path / "run"
    assert train.train(config, run, log=stop_at(step)) == train.PREEMPTED
    assert train.train(config, run, log=quiet) == 0
    for a, b in zip(
        state_of(straight, config, 13), state_of(run, config, 13), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert records(run) == records(straight)
    assert evaluations(run) == evaluations(straight)


@pytest.fixture(scope="module")
def restarted(config, tmp_path_factory):
    """A config whose second stage begins its data anew, and a whole run of it."""
    restart = TransitionConfig(moments="keep", cursors="restart")
    second = dataclasses.replace(config.stages[1], transition=restart)
    cfg = dataclasses.replace(config, stages=(config.stages[0], second))
    run = tmp_path_factory.mktemp("runs") / "restarted"
    assert train.train(cfg, run, log=quiet) == 0
    return cfg, run


def cut_after(run, step, to):
    """A copy of a run as it was when its checkpoint `step` was the newest."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return to


@pytest.mark.parametrize("step", slow_but(7, of=(6, 7, 9)))
def test_a_stage_that_begins_its_data_anew_resumes_exactly(step, restarted, tmp_path):
    """Before, at and after the boundary of the two segments."""
    cfg, straight = restarted
    run = cut_after(straight, step, tmp_path / "run")
    assert train.train(cfg, run, log=quiet) == 0
    for a, b in zip(state_of(straight, cfg, 13), state_of(run, cfg, 13), strict=True):
        np.testing.assert_array_equal(a, b)
    assert records(run) == records(straight)
    metas = [
        checkpoint.Checkpoints(r / "checkpoints", read_only=True).meta(13)
        for r in (straight, run)
    ]
    for key in ("curricula", "consumed", "seed"):
        assert getattr(metas[0], key) == getattr(metas[1], key)


def test_init_from_inside_each_segment_goes_on_with_its_order(restarted, corpus):
    cfg, run = restarted
    plan = make_data_plan(cfg, corpus)
    for step, segment in ((6, 0), (7, 0), (9, 1), (13, 1)):
        path = run / "checkpoints" / str(step)
        store, meta, origin = load_origin(path, cfg, corpus)
        store.close()
        assert meta.seed == origin["seed"] == plan.runs[segment].curriculum.seed
        assert origin["cursors"] == plan.consumed(step)
        assert not origin["restarted"]


def test_where_segments_begin_cannot_change_once_they_have(
    restarted, straight, config, tmp_path
):
    """Both ways; before that they may."""
    cfg, run = restarted
    began = cut_after(run, 9, tmp_path / "a"), cut_after(straight, 9, tmp_path / "b")
    for other, where in zip((config, cfg), began, strict=True):
        with pytest.raises(UserError, match=r"^stages.enrich.transition.cursors was"):
            train.train(other, where, log=quiet)
    at = cut_after(run, 7, tmp_path / "c")
    assert train.train(config, at, log=quiet) == 0
    tokens = [
        {k: v["tokens"] for k, v in records(r)[-1]["languages"].items()}
        for r in (at, straight)
    ]
    assert tokens[0] == tokens[1]


def test_a_finished_run_has_nothing_left_to_do(straight, config):
    before, seconds = records(straight), goodput(straight)
    said: list[str] = []
    assert train.train(config, straight, log=said.append) == 0
    assert records(straight) == before
    assert goodput(straight) == seconds
    assert len(said) == 1, said  # that it goes on, from a checkpoint that is whole


@pytest.mark.parametrize("torn", [b"", b'{"step": 13, "sta', b"\0" * 99])
def test_records_are_lines_and_damaged_ones_stay(tmp_path, torn):
    """Lines end at "\\n" alone; what is damaged costs no other record."""
    rows = [{"step": k, "stage": "a\u2028b\x85c"} for k in (4, 7, 8, 9, 12)]
    good = [json.dumps(r, ensure_ascii=False).encode() for r in rows]
    bad = [b'{"step": 5, "st', b"\xff\xfe{}", b"[]", b'{"stage": "a"}', b""]
    lines = [good[0], *bad, good[1], good[2], *bad, good[3], *bad, good[4]]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*lines, torn]))
    (tmp_path / "lineage.json").write_text("{}")
    with contextlib.closing(RunFolder(tmp_path)) as run:
        assert run.start_metrics(8) == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13]
        run.add(rows[3])
    # The last five stand between records that are made again.
    assert path.read_bytes().split(b"\n") == [*lines[:13], good[3], b""]
    # A last line that only lacks its end is whole.
    path.write_bytes(b"\n".join(good))
    with contextlib.closing(RunFolder(tmp_path)) as run:
        assert run.start_metrics(12) == []
    assert path.read_bytes().split(b"\n") == [*good, b""]


def test_a_damaged_record_is_named_on_resume(straight, config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:40]
    path.write_bytes(b"\n".join(lines))
    said: list[str] = []
    assert train.train(config, run, log=said.append) == 0
    assert f"{path}: line 2 is damaged and stays as it is" in said
    assert path.read_bytes().split(b"\n") == lines


def test_what_is_set_aside_is_read_back(tmp_path):
    place = ("ru/a", "corpus\u2028/00000.records", 3)
    BadRecordLog(Spool(tmp_path), 0)(*place, "why")
    with open(tmp_path / "set_aside.0.jsonl", "ab") as f:
        f.write(b'\n{"source": "ru/a", "sha\xff')  # torn
    again = BadRecordLog(Spool(tmp_path), 0)
    assert again.counts == {"ru/a": 1}
    again(*place, "why")
    again("ru/a", place[1], 4, "why")
    assert BadRecordLog(Spool(tmp_path), 0).counts == {"ru/a": 2}


def goodput(run):
    return json.loads((run / "goodput.json").read_text())


def parts(seconds):
    return {k: v for k, v in seconds.items() if k != "wall"}


def test_goodput_adds_up(straight):
    seconds = goodput(straight)
    assert sum(parts(seconds).values()) == pytest.approx(seconds["wall"])
    assert all(v >= 0 for v in seconds.values())
    assert min(seconds[k] for k in ("productive", "start", "compile", "evaluate")) > 0
    assert seconds["interrupted"] < 1  # when it began is known to the millisecond


@pytest.mark.slow
def test_goodput_counts_what_an_interruption_costs(config, tmp_path):
    class CrashError(Exception):
        pass

    def crash(text):
        if "step 11/" in text:
            raise CrashError

    begin = time.time()
    with pytest.raises(CrashError):
        train.train(config, tmp_path, log=crash)
    first = goodput(tmp_path)
    time.sleep(1.5)
    said: list[str] = []
    assert train.train(config, tmp_path, log=said.append) == 0
    second = goodput(tmp_path)
    assert sum(parts(second).values()) == pytest.approx(second["wall"])
    assert second["wall"] <= time.time() - begin + 0.01
    assert second["interrupted"] > 1.5  # away, and steps 10 and 11 again
    assert second["start"] > first["start"]
    assert second["compile"] > first["compile"] - 1e-6
    assert "goodput" in said[-1]
    assert "interrupted" in said[-1]


@pytest.mark.slow
def test_a_complete_run_that_goes_on_was_not_interrupted(
    straight, config, tmp_path, monkeypatch
):
    """Stages that are added days later: the days between are no part of the run."""
    run, cfg, day = shutil.copytree(straight, tmp_path / "run"), config, 86_400
    for days, name in enumerate(("more", "last"), 1):
        later = types.SimpleNamespace(
            time=lambda days=days: time.time() + days * day,
            perf_counter=time.perf_counter,
        )
        monkeypatch.setattr(meters, "time", later)
        before = goodput(run)
        added = dataclasses.replace(config.stages[1], name=name)
        cfg = dataclasses.replace(cfg, stages=(*cfg.stages, added))
        assert train.train(cfg, run, log=quiet) == 0
        after = goodput(run)
        assert sum(parts(after).values()) == pytest.approx(after["wall"])
        # Less than the seconds of this test.
        assert after["interrupted"] < after["wall"] < before["wall"] + 600
        assert after["productive"] > before["productive"]


@pytest.mark.slow
def test_slow_data_are_seen(config, tmp_path, monkeypatch):
    def slow(*args):
        for batch in batches(*args):
            time.sleep(0.5)  # longer than a step on a busy machine
            yield batch

    batches = train.batches
    monkeypatch.setattr(train, "batches", slow)
    assert train.train(config, tmp_path, log=quiet) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    # Not counted: where a checkpoint had emptied the device before.
    assert sum(t["stalled_steps"] for t in times) >= 3
    assert goodput(tmp_path)["input"] >= 13 * 0.5


# A type of jaxlib's trace reader: on Python 3.13 the error would abort the process.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_a_profile_of_some_steps(config, tmp_path):
    said: list[str] = []
    train.train(config, tmp_path, log=said.append, profile=(3, 4))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = ProfileData.from_file(str(trace))
    events = [e for p in data.planes for line in p.lines for e in line.events]
    steps = {dict(e.stats).get("step_num") for e in events if e.name == "train"}
    assert steps == {3, 4}
    assert sum(str(tmp_path / "profile") in text for text in said) == 1
    with pytest.raises(UserError, match=r"--profile 3:4: the run has made 13 of 13"):
        train.train(config, tmp_path, log=quiet, profile=(3, 4))
    with pytest.raises(UserError, match=r"has made 0 of 13 steps: give some of 1:13"):
        train.train(config, tmp_path / "new", log=quiet, profile=(13, 14))


def test_the_transition_resets_or_keeps_the_moments(straight, config, tmp_path):
    """Adam's own count tells: 13 updates if kept, 6 if reset at the boundary."""

    def counts(run, cfg):
        scalars = [int(x) for x in state_of(run, cfg, 13) if np.ndim(x) == 0]
        return sorted(scalars)

    assert counts(straight, config) == [6, 13]
    enrich = dataclasses.replace(config.stages[1], transition=TransitionConfig("keep"))
    keep = dataclasses.replace(config, stages=(config.stages[0], enrich))
    run = tmp_path / "keep"
    assert train.train(keep, run, log=quiet) == 0
    assert counts(run, keep) == [13, 13]
    # The learning rate follows tokens either way.
    rates = [r["lr"] for r in records(run)]
    assert rates == [r["lr"] for r in records(straight)]
    assert rates[1] == pytest.approx(3e-3)
    assert 0 < rates[-1] < 3e-4


def test_init_from_goes_on_with_parameters_tokens_and_cursors(
    straight, config, corpus, tmp_path
):
    stage = dataclasses.replace(
        config.stages[1],
        mixture=MixtureConfig("explicit", {"en/help": 0.5, "ru/help": 0.5}),
        transition=TransitionConfig("keep", "continue"),
    )
    second = dataclasses.replace(config, name="second", stages=(stage,))
    run = tmp_path / "second"
    origin = straight / "checkpoints" / "7"
    assert train.train(second, run, origin, log=quiet) == 0
    first = records(run)[0]
    assert first["tokens"] == (7 + 4) * 8 * 64
    meta = checkpoint.Checkpoints(run / "checkpoints", read_only=True).meta(6)
    start = make_data_plan(config, corpus).consumed(7)
    assert meta.origin["cursors"] == start
    assert meta.consumed["en/help"] == start["en/help"] + 24
    assert meta.consumed["tr/help"] == start["tr/help"]
    # It really began from those parameters: its first loss is near the last one there,
    # and far from a fresh model's.
    before = [r["nll"] for r in records(straight)]
    assert abs(first["nll"] - before[1]) < abs(first["nll"] - np.log(512))
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["init_from"]["lineage"]["run"] == "small"

    restart = dataclasses.replace(
        second,
        stages=(
            dataclasses.replace(stage, transition=TransitionConfig("reset", "restart")),
        ),
    )
    plan = make_data_plan(restart, corpus, meta.origin)
    assert plan.consumed(0)["en/help"] == 0


@pytest.fixture(scope="module")
def reversed_corpus(corpus, tmp_path_factory):
    """The same corpus with the records of a source in reverse order: its sizes, its
    path inside the folder and its words are the same."""
    folder = tmp_path_factory.mktemp("other") / "corpus"
    shutil.copytree(corpus.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"] = "0" * 64
    for row in manifest["sources"]["tr/help"]["shards"]:
        path = folder / row["file"]
        shard = FlatShard(str(path), 2 * 65)
        rows = [shard.read(i) for i in reversed(range(len(shard)))]
        small_corpora.write_shard(path, rows)
        row["sha256"] = file_sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_corpus(folder)


def test_a_corpus_swapped_under_a_run_is_refused(
    straight, config, replace, corpus, reversed_corpus, tmp_path
):
    run = cut_after(straight, 7, tmp_path / "run")
    before = (run / "lineage.json").read_text()
    swapped = replace(config, "data.corpus", str(reversed_corpus.folder))
    served = make_data_plan(config, corpus).served(7)["tr/help"]
    with pytest.raises(UserError, match=f"with {served} of the {served} examples"):
        train.train(swapped, run, log=quiet)
    assert (run / "lineage.json").read_text() == before


def test_processes_with_copies_of_other_texts(
    config, corpus, reversed_corpus, monkeypatch
):
    """Each batch would be a mixture of both."""
    seen = []
    monkeypatch.setattr(cluster, "gather", lambda x: seen.append(x) or np.array(seen))
    check_corpus(config, corpus)
    check_corpus(config, open_corpus(corpus.folder))
    with pytest.raises(UserError, match=r"processes \[2\] have other texts in corpus"):
        check_corpus(config, reversed_corpus)


def test_init_from_begins_a_swapped_source_anew(
    straight, config, corpus, reversed_corpus
):
    path = straight / "checkpoints" / "7"
    store, _, origin = load_origin(path, config, reversed_corpus)
    store.close()
    assert origin["restarted"] == ["tr/help"]
    cursors = make_data_plan(config, corpus).consumed(7)
    assert origin["cursors"] == {k: cursors[k] for k in ("en/help", "ru/help")}
    recipe, source = origin["corpus_changes"]
    assert "its recipe was" in recipe
    assert "source tr/help: 1 of its 1 shards changed (0)" in source


def test_a_changed_corpus_goes_into_the_lineage(
    straight, config, replace, corpus, tmp_path
):
    """Here a held-out set, which no example is of."""
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["heldout"]["udhr"]["languages"]["tr"]["sha256"] = "0" * 64
    manifest["recipe"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run, said = cut_after(straight, 12, tmp_path / "run"), []
    cfg = replace(config, "data.corpus", str(folder))
    assert train.train(cfg, run, log=said.append) == 0
    assert any("held-out set udhr in tr has other texts" in text for text in said)
    lineage = json.loads((run / "lineage.json").read_text())
    (event,) = [e for e in lineage["events"] if e["event"] == "corpus"]
    assert (event["old"], event["new"]) == (corpus.manifest["recipe"], "0" * 64)
    assert len(event["changes"]) == 2


def test_future_stages_may_change_and_the_past_may_not(straight, config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for step in (12, 13):
        shutil.rmtree(run / "checkpoints" / str(step))
    first, second = config.stages
    past = dataclasses.replace(
        first, mixture=MixtureConfig("explicit", {"en/help": 0.9, "ru/help": 0.1})
    )
    with pytest.raises(UserError, match="^stages.align.mixture.shares.en/help was 0.4"):
        train.train(dataclasses.replace(config, stages=(past, second)), run, log=quiet)
    assert json.loads((run / "config.json").read_text())["stages"][0]["mixture"][
        "shares"
    ] == dict(first.mixture.shares)  # a refused config leaves no trace
    third = dataclasses.replace(
        second, name="third", tokens=8 * 64, mixture=first.mixture,
        schedule=dataclasses.replace(second.schedule, decay_tokens=0),
    )  # fmt: skip
    longer = dataclasses.replace(config, stages=(first, second, third))
    said = []
    assert train.train(longer, run, log=said.append) == 0
    (change,) = [line for line in said if "config change" in line]
    assert change.endswith(": stages: align, enrich -> align, enrich, third")
    assert records(run)[-1]["step"] == 14
    lineage = json.loads((run / "lineage.json").read_text())
    assert [s["name"] for s in lineage["stages"]] == ["align", "enrich", "third"]
    assert json.loads(evaluations(run)["13.json"])["label"] == "end of enrich"


def test_evaluations_after_the_checkpoint_are_made_again(
    straight, config, replace, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for step in (12, 13):
        shutil.rmtree(run / "checkpoints" / str(step))
    schedule = dataclasses.replace(config.stages[1].schedule, peak=3e-2)
    second = dataclasses.replace(config.stages[1], schedule=schedule)
    changed = dataclasses.replace(config, stages=(config.stages[0], second))
    assert train.train(changed, run, log=quiet) == 0
    new, old = evaluations(run), evaluations(straight)
    assert new["7.json"] == old["7.json"]
    assert new["13.json"] != old["13.json"]


def test_the_preview_of_a_run_that_goes_on_from_another(
    straight, config, tmp_path, capsys
):
    """Its warm-up fits before it, so the preview has to know where it begins."""
    cfg = dataclasses.replace(config, stages=(config.stages[1],))
    path = tmp_path / "second.py"
    path.write_text(
        "from gamayun_jax.config import from_json\n"
        f"def get_config():\n    return from_json({to_json(cfg)!r})\n"
    )
    assert cli.main(["curriculum", str(path)]) == 2
    assert "give it by --init-from" in capsys.readouterr().err
    origin = ["--init-from", str(straight / "checkpoints" / "7")]
    assert cli.main(["curriculum", str(path), *origin]) == 0
    assert "en/help" in capsys.readouterr().out


def test_another_model_is_told_by_its_fields(straight, config, replace, tmp_path):
    other = replace(config, "model.d_ff", 128)
    with pytest.raises(
        UserError, match=r"config's: model.d_ff is 64 there and 128 here"
    ):
        train.train(other, tmp_path, straight / "checkpoints" / "7", log=quiet)


def test_what_a_later_stage_would_be_refused_for_is_refused_at_once(config, tmp_path):
    weights = TokenWeightConfig("target_share", {"en": 0.5, "ru": 0.3, "tr": 0.2})
    mixture = MixtureConfig("explicit", {"en/help": 0.5, "ru/help": 0.5})
    second = dataclasses.replace(
        config.stages[1], token_weights=weights, mixture=mixture
    )
    cfg = dataclasses.replace(config, stages=(config.stages[0], second))
    with pytest.raises(UserError, match=r"^stages.enrich.token_weights.weights gives"):
        train.train(cfg, tmp_path, log=quiet)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_init_from_is_never_ignored(straight, config, tmp_path):
    with pytest.raises(UserError, match="began from nothing"):
        train.train(config, straight, straight / "checkpoints" / "7", log=quiet)
    with pytest.raises(UserError, match="nowhere does not exist"):
        train.train(config, straight, tmp_path / "nowhere", log=quiet)
    stage = dataclasses.replace(
        config.stages[1], mixture=MixtureConfig("natural"), tokens=4 * 8 * 64,
        schedule=dataclasses.replace(config.stages[1].schedule, decay_tokens=0),
    )  # fmt: skip
    cfg = dataclasses.replace(config, name="second", stages=(stage,))
    run = tmp_path / "second"
    told = []
    origin = straight / "checkpoints" / "7"
    assert train.train(cfg, run, origin, log=told.append) == 0
    assert any("its run is not complete, at step 7 of 13" in line for line in told)
    # The flag may stay on the command line, or go; another one is refused.
    assert train.train(cfg, run, straight / "checkpoints" / "7", log=quiet) == 0
    assert train.train(cfg, run, log=quiet) == 0
    with pytest.raises(UserError, match=r"not from straight/checkpoints/13"):
        train.train(cfg, run, straight / "checkpoints" / "13", log=quiet)
    # Killed before its first checkpoint, it does not start from nothing.
    shutil.rmtree(run / "checkpoints")
    lineage = json.loads((run / "lineage.json").read_text())
    (run / "lineage.json").write_text(json.dumps({**lineage, "checkpoints": []}))
    with pytest.raises(UserError, match="give the same --init-from again"):
        train.train(cfg, run, log=quiet)


def test_no_example_comes_again_after_init_from(config, corpus):
    """Whatever the seed of the second config: the order goes on, not only the count."""
    plan = make_data_plan(config, corpus)
    origin = {
        "cursors": plan.consumed(7),
        "seed": plan.runs[-1].curriculum.seed,
        "shares": plan.shares[0],
    }
    second = dataclasses.replace(config, seed=5, stages=(config.stages[1],))
    going_on = make_data_plan(second, corpus, origin)
    assert going_on.runs[0].curriculum.seed == plan.runs[0].curriculum.seed
    # A ramp in a first stage begins at the former run's shares.
    points = share_points(second, going_on)
    assert points[0]["shares"]["tr/help"] == pytest.approx(0.2)
    restart = dataclasses.replace(
        second,
        seed=config.seed,
        stages=(
            dataclasses.replace(
                second.stages[0], transition=TransitionConfig(cursors="restart")
            ),
        ),
    )
    assert (
        make_data_plan(restart, corpus, origin).runs[0].curriculum.seed
        != plan.runs[0].curriculum.seed
    )


def test_a_second_stage_far_beyond_int32_tokens(config):
    """The real one begins at 2e12 tokens: no count of tokens may be an int32."""
    from flax import linen as nn

    from gamayun_jax.model import sharding
    from gamayun_jax.model.loss import TokenWeights
    from gamayun_jax.training.step import compile_step

    mesh = sharding.make_mesh(config.mesh)
    tables = TokenWeights(np.ones(3, np.float32), np.ones(512, np.float32))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        abstract = abstract_state(config, mesh)
        compile_step(config, mesh, abstract, 1, tables, tokens_before=2 * 10**12)


def test_divergence_stops_before_anything_bad_is_saved(config, tmp_path):
    schedule = dataclasses.replace(config.stages[0].schedule, peak=1e30)
    first = dataclasses.replace(config.stages[0], schedule=schedule)
    cfg = dataclasses.replace(config, stages=(first, config.stages[1]))
    with pytest.raises(UserError, match="not finite at step"):
        train.train(cfg, tmp_path / "run", log=quiet)
    store = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    for step in store.steps():
        leaves = state_of(tmp_path / "run", cfg, step)
        assert all(np.isfinite(x).all() for x in leaves)
    store.close()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", 1, "seed was 0 in the run's checkpoint"),
        ("model.d_ff", 128, "model.d_ff was 64"),
        ("data.batch_size", 16, "data.batch_size was 8"),
    ],
)
def test_what_a_run_cannot_change(straight, config, replace, field, value, message):
    with pytest.raises(UserError, match=message):
        train.train(replace(config, field, value), straight, log=quiet)


def test_a_harmless_change_goes_on_with_a_note(straight, config, replace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "13")
    seen = []
    changed = replace(config, "checkpoint.keep", 19)
    assert train.train(changed, run, log=seen.append) == 0
    assert any("checkpoint.keep: 20 -> 19" in text for text in seen)
    lineage = json.loads((run / "lineage.json").read_text())
    assert lineage["events"][-1]["field"] == "checkpoint.keep"
    assert json.loads((run / "config.json").read_text())["checkpoint"]["keep"] == 19


def test_two_runs_in_one_folder(straight, config):
    held = RunFolder(straight)
    try:
        with pytest.raises(UserError, match="in use by another process"):
            train.train(config, straight, log=quiet)
    finally:
        held.close()


def test_batch_and_mesh_that_do_not_fit(config, replace, tmp_path):
    with pytest.raises(UserError, match="use a multiple of 2"):
        train.train(replace(config, "data.batch_size", 11), tmp_path)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        train.train(replace(config, "mesh.tensor", 3), tmp_path)


def test_a_corpus_of_another_tokenizer(config, replace, tmp_path):
    other = replace(config, "corpus.tokenizer.vocab_size", 500)
    with pytest.raises(UserError, match="another tokenizer"):
        train.train(other, tmp_path)


def test_a_missing_corpus(config, replace, tmp_path):
    lost = replace(config, "data.corpus", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="gamayun corpus build"):
        train.train(lost, tmp_path)


def test_an_epoch_cap(config, replace, tmp_path):
    capped = replace(config, "data.max_epochs_of", {"tr/help": 0.001})
    with pytest.raises(UserError, match="'tr/help' would be seen"):
        train.train(capped, tmp_path)


def test_only_stage_ends_and_the_newest_are_kept(config, replace, tmp_path):
    run = Path(tmp_path / "run")
    few = replace(config, "checkpoint.keep", 1)
    assert train.train(few, run, log=quiet) == 0
    kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert kept == [7, 13]


@pytest.mark.slow
def test_tasks_run_in_the_loop(config, tmp_path):
    """Before training, every so many steps and at stages' ends; stopped or not."""
    from gamayun_jax.evaluate import results
    from gamayun_jax.report import report

    evaluation = dataclasses.replace(
        config.evaluation, tasks=("cldr_facts", "udhr"), tasks_every_steps=5,
        task_items=3,
    )  # fmt: skip
    cfg = dataclasses.replace(config, evaluation=evaluation)
    lines = []
    assert train.train(cfg, tmp_path / "a", log=lines.append) == 0
    assert any("tasks/cldr_facts/norm" in line for line in lines)
    found = {
        int(p.stem): json.loads(p.read_text())
        for p in (tmp_path / "a" / "eval").glob("*.json")
    }
    assert sorted(found) == [0, 5, 7, 10, 13]
    assert all(set(e["tasks"]) == {"cldr_facts", "udhr"} for e in found.values())
    assert found[5]["sets"] == {}
    assert "udhr" in found[7]["sets"]
    for step in (0, 7, 13):
        folder = tmp_path / "a" / "eval" / f"{step}.items"
        rows = results.read_items(folder, "cldr_facts")
        assert [r["language"] for r in rows] == ["en"] * 3 + ["ru"] * 3 + ["tr"] * 3
    assert not (tmp_path / "a" / "eval" / "5.items").exists()
    page = report.write_report([tmp_path / "a"], tmp_path / "page").read_text()
    assert "Task “cldr_facts” over training" in page
    assert train.train(cfg, tmp_path / "b", log=stop_at(11)) == train.PREEMPTED
    assert train.train(cfg, tmp_path / "b", log=quiet) == 0
    assert evaluations(tmp_path / "b") == evaluations(tmp_path / "a")
    wrong = dataclasses.replace(evaluation, tasks=("nonsense",))
    with pytest.raises(UserError, match="there is no task 'nonsense'"):
        train.train(dataclasses.replace(cfg, evaluation=wrong), tmp_path / "c")
