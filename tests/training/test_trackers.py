"""What a run shows while it trains, read back: TensorBoard, trackio, wandb."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import pytest

from gamayun_jax import train
from gamayun_jax.config import UserError, to_dict
from gamayun_jax.training import trackers
from gamayun_jax.training.run_folder import SAMPLES, RunFolder


def quiet(text):
    pass


def stop_at(step):
    """A log function that sends SIGTERM once the given record is written."""

    def log(text):
        if f"step {step}/" in text and "eval" not in text:
            os.kill(os.getpid(), signal.SIGTERM)

    return log


def records(run):
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    """The events of a run folder, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(run.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its CRC, data, its CRC
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_tensorboard_has_each_step_once(config, replace, tmp_path):
    cfg = replace(config, "log.tensorboard", True)
    run = tmp_path / "run"
    assert train.train(cfg, run, log=stop_at(11)) == train.PREEMPTED
    assert train.train(cfg, run, log=quiet) == 0
    purged, seen = [], []
    for event in events(run):
        if event.session_log.status:
            purged.append(event.step)
            seen = [s for s in seen if s < event.step]
        for value in event.summary.value:
            if value.tag == "train/nll":
                seen.append(event.step)
    assert purged[-1] % (8 * 64) == 1  # just after the step it stopped at
    assert seen == [r["tokens"] for r in records(run)]


@pytest.mark.slow
def test_tensorboard_has_what_the_model_writes(config, replace, tmp_path):
    """The samples of the report: by language, before and after each stage."""
    cfg = replace(config, "log.tensorboard", True)
    evaluation = dataclasses.replace(
        cfg.evaluation, tasks=("cldr_names",), task_items=SAMPLES + 1
    )
    cfg = dataclasses.replace(cfg, evaluation=evaluation)
    run = tmp_path / "run"
    assert train.train(cfg, run, log=quiet) == 0
    texts = {
        (value.tag.removesuffix("/text_summary"), event.step): b"".join(
            value.tensor.string_val
        ).decode()
        for event in events(run)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    }
    wanted = {}
    for step in (0, 7, 13):
        path = run / "eval" / f"{step}.items" / "cldr_names.jsonl"
        for item in map(json.loads, path.read_text().splitlines()):
            place = (f"samples/cldr_names/{item['language']}", step * 8 * 64)
            wanted.setdefault(place, []).append(item)
    assert {k[0] for k in wanted} == {
        f"samples/cldr_names/{k}" for k in ("en", "ru", "tr")
    }
    assert set(texts) == set(wanted)
    for place, items in wanted.items():
        assert len(items) == SAMPLES + 1
        plain = texts[place].replace("\n    ", "\n")
        for item in items[:SAMPLES]:
            assert {item["prompt"], item["answers"][0]} <= set(plain.split("\n\n"))
            assert item["text"].strip() in plain
        assert plain.count("\n---\n") == SAMPLES - 1


# --- Weights & Biases, trackio ----------------------------------------------------


class Service:
    """A module of the shape of wandb and trackio, which keeps what it is told."""

    def __init__(self, fails_at=""):
        self.fails_at, self.told, self.hangs = fails_at, [], threading.Event()

    def _tell(self, *what):
        if self.fails_at == f"hangs in {what[0]}":
            self.hangs.wait(60)
        if self.fails_at == what[0]:
            raise ConnectionError("no network")
        self.told.append(what)

    def init(self, **named):
        self._tell("init", named)
        return types.SimpleNamespace(
            log=lambda values, step: self._tell("log", step, values),
            finish=lambda: self._tell("finish"),
        )


@pytest.fixture
def service(monkeypatch):
    def make(name, **arguments):
        made = Service(**arguments)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return make


def sent(rows):
    """(step, tag) -> value of calls of log; each pair once."""
    seen = [
        ((step, tag), v) for step, row in rows for tag, v in row.items() if "/" in tag
    ]
    assert len(dict(seen)) == len(seen)
    return dict(seen)


def wanted(run):
    """The same by the run folder's own records, for two tags."""
    found = {(r["step"], "train/nll"): r["nll"] for r in records(run)}
    for path in (run / "eval").glob("*.json"):
        record = json.loads(path.read_text())
        for name, part in record["sets"].items():
            tag = f"eval/{name}/bits_per_byte/macro"
            found[record["step"], tag] = part["macro"]["bits_per_byte"]
    return found


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_has_each_step_once(config, replace, service, tmp_path, name):
    """SIGTERM ends its run there; started again it goes on as the same one."""
    made = service(name)
    cfg, run = replace(config, "log.tracker", name), tmp_path / "run"
    assert train.train(cfg, run, log=stop_at(11)) == train.PREEMPTED
    assert made.told[-1] == ("finish",)
    assert train.train(cfg, run, log=quiet) == 0
    assert made.told[-1] == ("finish",)
    before = len(made.told)
    assert train.train(cfg, run, log=quiet) == 0  # nothing to say
    assert len(made.told) == before
    begins = [named for kind, *(named,) in (t for t in made.told if t[0] == "init")]
    assert begins[0] == begins[1]
    assert begins[0]["project"] == "gamayun"
    assert begins[0]["config"] == to_dict(cfg)
    got = sent([t[1:] for t in made.told if t[0] == "log"])
    assert {k: got[k] for k in wanted(run)} == wanted(run)
    steps = [t[1] for t in made.told if t[0] == "log"]
    assert steps == sorted(steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fails_at", ["init", "log", "finish", "hangs in init", "hangs in log"]
)
def test_a_service_that_fails_stops_nothing(
    config, replace, service, tmp_path, monkeypatch, fails_at
):
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    made = service("wandb", fails_at=fails_at)
    cfg, run, said = replace(config, "log.tracker", "wandb"), tmp_path / "run", []
    assert train.train(cfg, run, log=said.append) == 0
    assert records(run)[-1]["step"] == 13
    (failure,) = [x for x in said if "log.tracker" in x]
    assert ("no answer" if "hangs" in fails_at else "no network") in failure
    made.hangs.set()


def test_a_slow_service_is_not_waited_for(
    config, replace, service, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers, "BACKLOG", 2)
    made = service("wandb", fails_at="hangs in init")
    cfg, said = replace(config, "log.tracker", "wandb"), []
    assert train.train(cfg, tmp_path / "run", log=said.append) == 0
    assert sum("2 records wait" in x for x in said) == 1
    made.hangs.set()


def test_a_run_from_its_beginning_is_another_there(config, replace, service, tmp_path):
    made = service("wandb")
    cfg = replace(config, "log.tracker", "wandb")
    folder = RunFolder(tmp_path / "run")
    with trackers.open_trackers(cfg, folder, print) as (one,):
        one.start(0, 0)
        one.write(4, 4, {"train/nll": 1.0}, {})
        one.start(4, 4)  # a rollback: what is made again is not sent again
        one.write(4, 4, {"train/nll": 2.0}, {})
        one.write(4, 4, {"eval/a": 2.5, "eval/b": None}, {})
        one.start(0, 0)
        one.write(4, 4, {"train/nll": 3.0}, {})
    folder.close()
    ids = [t[1]["id"] for t in made.told if t[0] == "init"]
    assert len(set(ids)) == len(ids) == 2
    assert [t[2] for t in made.told if t[0] == "log"] == [
        {"tokens": 4, "train/nll": 1.0},
        {"tokens": 4, "eval/a": 2.5},
        {"tokens": 4, "train/nll": 3.0},
    ]


def test_the_first_process_alone_sends(config, replace, service, tmp_path):
    service("wandb")
    cfg = replace(config, "log.tracker", "wandb")
    with trackers.open_trackers(cfg, RunFolder(tmp_path, writer=False), print) as made:
        assert made == []


def test_a_copied_run_folder_is_another_run_there(config, replace, service, tmp_path):
    """It may go on beside the original, which keeps its own."""
    made = service("wandb")
    cfg = replace(config, "log.tracker", "wandb")
    assert train.train(cfg, tmp_path / "a", log=stop_at(11)) == train.PREEMPTED
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        assert train.train(cfg, tmp_path / name, log=quiet) == 0
    ids = [(t[1]["name"], t[1]["id"]) for t in made.told if t[0] == "init"]
    assert [name for name, _ in ids] == ["a", "a", "b"]
    assert ids[0] == ids[1]
    assert ids[1][1] != ids[2][1]
    steps = [t[1] for t in made.told if t[0] == "log"]
    assert steps[-1] == 13


def test_what_a_service_wrote_moves_aside_with_the_records(tmp_path):
    """Or a start that is killed just after --fresh would find files of no run."""
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "lineage.json").write_text("{}")
    with contextlib.closing(RunFolder(tmp_path)) as folder:
        place = folder.begin_afresh()
    assert (place / "wandb" / "offline-run-1").is_dir()
    RunFolder(tmp_path).close()


def test_a_broken_package_is_named(config, replace, tmp_path, monkeypatch):
    """What fails at import need not be an ImportError."""
    (tmp_path / "wandb.py").write_text("raise TypeError('protobuf is too new')")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = replace(config, "log.tracker", "wandb")
    with pytest.raises(UserError, match=r"TypeError: protobuf is too new"):
        train.train(cfg, tmp_path / "run", log=quiet)


@pytest.mark.parametrize("missing", [None, types.ModuleType("wandb")])
def test_a_missing_package_is_named(config, replace, tmp_path, monkeypatch, missing):
    """Also where a folder of its name is found instead."""
    monkeypatch.setitem(sys.modules, "wandb", missing)
    cfg = replace(config, "log.tracker", "wandb")
    with pytest.raises(UserError, match=r"log\.tracker='wandb'.*pip install wandb"):
        train.train(cfg, tmp_path / "run", log=quiet)


def test_trackio_keeps_a_run(config, replace, tmp_path, monkeypatch):
    """Of the real package, in its local database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    if Path(trackio.utils.TRACKIO_DIR).parent != tmp_path:
        pytest.skip("trackio was imported before, with another folder")
    cfg, run = replace(config, "log.tracker", "trackio"), tmp_path / "run"
    assert train.train(cfg, run, log=stop_at(11)) == train.PREEMPTED
    assert train.train(cfg, run, log=quiet) == 0
    (kept,) = trackio.Api().runs("gamayun")
    rows = trackio.SQLiteStorage.get_logs("gamayun", kept.name, run_id=kept.id)
    got = sent([(row["step"], row) for row in rows])
    assert {k: got[k] for k in wanted(run)} == pytest.approx(wanted(run))
    assert kept.config["model"] == to_dict(cfg)["model"]


def wandb_records(path):
    """Serialised records of a .wandb file: LevelDB's log format after 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no header begins there
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def test_wandb_keeps_a_run(config, replace, tmp_path, monkeypatch):
    """Of the real package, offline: two files of one run."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg, run = replace(config, "log.tracker", "wandb"), tmp_path / "run"
    assert train.train(cfg, run, log=stop_at(11)) == train.PREEMPTED
    assert train.train(cfg, run, log=quiet) == 0
    wandb.teardown()
    rows, names = [], set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(path)):
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.display_name))
            items = {
                i.key or "/".join(i.nested_key): json.loads(i.value_json)
                for i in record.history.item
            }
            rows += [(record.history.step.num, items)] if items else []
    assert len(names) == 1
    got = sent(rows)
    assert {k: got[k] for k in wanted(run)} == pytest.approx(wanted(run))
