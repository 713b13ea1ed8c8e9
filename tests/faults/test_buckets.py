"""A run whose folder is in a bucket: the promises of docs/reliability.md there."""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import threading
import time

import pytest
from test_hosts import finish, start_all

from gamayun_jax import train
from gamayun_jax.config import UserError
from gamayun_jax.lease import LostError
from gamayun_jax.report import read_run
from gamayun_jax.storage import InUseError, as_path, remove_tree, upload
from gamayun_jax.training import run_folder, spool
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.run_folder import RunFolder
from gamayun_jax.training.spool import metric_lines


def quiet(text):
    pass


def leaves(run):
    folder, step = run_folder.find_checkpoint(run)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as store:
        return step, store.meta(step).checksums


def records(run):
    lines = [row for _, row in metric_lines(as_path(run))]
    times = ("time", "hosts")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.fixture(scope="module")
def small(config):
    few = dataclasses.replace(config.evaluation, max_units=2)
    log = dataclasses.replace(config.log, tensorboard=True)
    return dataclasses.replace(config, evaluation=few, log=log)


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    run = tmp_path_factory.mktemp("buckets") / "run"
    assert train.train(small, run, log=quiet) == 0
    return run


def test_a_run_in_a_bucket_is_the_same(small, straight, bucket, bucket_server):
    assert train.train(small, bucket, log=quiet) == 0
    assert leaves(bucket) == leaves(straight)
    assert records(bucket) == records(straight)
    here, there = read_run.read_run(straight), read_run.read_run(bucket)
    assert here.evals == [] or [dict(e) for e in here.evals] == [
        dict(e) for e in there.evals
    ]
    assert there.goodput["wall"] > 0
    names = {p.name for p in as_path(bucket).iterdir()}
    assert {"config.json", "lineage.json", "checkpoints", "eval", "metrics"} <= names
    assert ".lock" not in names
    events = [p for p in as_path(bucket).iterdir() if p.name.startswith("events.")]
    assert sum(p.size() for p in events) > 0


class Crash(Exception):  # noqa: N818
    """What ends a run in its midst."""


def crash_at(step):
    def log(text):
        if f"step {step}/" in text and "left" in text:
            raise Crash

    return log


@pytest.fixture
def begun(small, bucket):
    """A run in a bucket that ended after step 11; its newest checkpoint is step 9."""
    with pytest.raises(Crash):
        train.train(small, bucket, log=crash_at(11))
    assert run_folder.checkpoint_steps(as_path(bucket))[-1] == 9
    return as_path(bucket)


def test_it_goes_on_as_if_nothing_had_been(small, straight, begun, monkeypatch):
    monkeypatch.setattr(spool, "CHUNK", 1)  # a file for each record
    said = []
    assert train.train(small, begun, log=said.append) == 0
    assert any(text.startswith("going on from step ") for text in said)
    assert leaves(begun) == leaves(straight)
    assert records(begun) == records(straight)
    assert len(spool.record_files(begun)) > 1


@pytest.mark.slow
def test_a_start_asks_little(small, begun, bucket_server):
    """Each request is a wait: what a folder has is known by one listing."""
    number = len(run_folder.checkpoint_steps(begun))
    bucket_server.reset()
    with pytest.raises(Crash):
        train.train(small, begun, log=crash_at(11))
    asked = [name for kind, name in bucket_server.log if kind in ("list", "stat")]
    assert len(asked) < 32 + 3 * number


@pytest.mark.slow
def test_a_second_writer_is_refused(small, begun):
    with contextlib.closing(RunFolder(begun)):
        before = leaves(begun)
        with pytest.raises(InUseError, match=r"run folder gs://.* is in use by "):
            train.train(small, begun, log=quiet)
        assert leaves(begun) == before
    assert train.train(small, begun, log=quiet) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["meta/", "params/"])
def test_a_checkpoint_that_the_bucket_refuses_is_not_set_aside(
    small, straight, begun, bucket_server, part
):
    """A right that is lacking for a while says nothing of the files."""
    there = run_folder.checkpoint_steps(begun)

    def fault(kind, name):
        return 403 if kind == "read" and f"/9/{part}" in name else None

    bucket_server.fault = fault
    with pytest.raises(UserError, match=r"/9 cannot be read now .*Nothing was moved"):
        train.train(small, begun, log=quiet)
    bucket_server.fault = lambda *_: None
    assert run_folder.checkpoint_steps(begun) == there
    assert train.train(small, begun, log=quiet) == 0
    assert leaves(begun) == leaves(straight)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(small, straight, begun):
    newest = max(run_folder.checkpoint_steps(begun))
    path = max(
        (begun / "checkpoints" / str(newest) / "params" / "d").iterdir(),
        key=lambda p: p.size(),
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    said = []
    assert train.train(small, begun, log=said.append) == 0
    assert f"moved to {begun}/damaged/{newest}" in " ".join(said)
    assert (begun / "damaged" / str(newest) / "params").is_dir()
    assert leaves(begun) == leaves(straight)
    assert records(begun) == records(straight)


def test_half_a_checkpoint_is_none(small, straight, begun):
    """A kill before the mark is written, and one before that of its parts."""
    newest = begun / "checkpoints" / str(max(run_folder.checkpoint_steps(begun)))
    (newest / "commit_success.txt").unlink()
    meta = newest / "_CHECKPOINT_METADATA"
    meta.write_text(meta.read_text().replace("commit_timestamp_nsecs", "begun"))
    (newest / "meta" / "commit_success.txt").unlink()
    assert int(newest.name) not in run_folder.checkpoint_steps(begun)
    assert run_folder.find_checkpoint(begun)[1] < int(newest.name)
    assert train.train(small, begun, log=quiet) == 0
    assert leaves(begun) == leaves(straight)
    assert records(begun) == records(straight)


@pytest.mark.slow
def test_lost_checkpoints_and_a_fresh_start(small, straight, begun):
    remove_tree(begun / "checkpoints")
    with pytest.raises(UserError, match="--fresh"):
        train.train(small, begun, log=quiet)
    assert train.train(small, begun, log=quiet, fresh=True) == 0
    assert (begun / "former" / "1" / "lineage.json").is_file()
    assert (begun / "former" / "1" / "metrics").is_dir()
    assert records(begun) == records(straight)


@pytest.mark.slow
def test_a_run_moves_into_a_bucket_and_out(small, straight, bucket, tmp_path):
    """Copied by other means than ours, which know of no marks."""
    there, here = as_path(bucket), tmp_path / "run"
    shutil.copytree(straight, here)
    shutil.rmtree(here / "checkpoints" / "13")
    shutil.rmtree(here / "checkpoints" / "12")
    upload(here, there)
    assert run_folder.find_checkpoint(there)[1] == 9
    assert train.train(small, there, log=quiet) == 0
    assert leaves(there) == leaves(straight)
    assert records(there) == records(straight)
    shutil.rmtree(here)
    for path in there.rglob("*"):
        place = here / path.relative_to(there)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    shutil.rmtree(here / "checkpoints" / "13")
    assert train.train(small, here, log=quiet) == 0
    assert leaves(here) == leaves(straight)
    assert records(here) == records(straight)


def error_of(small, run):
    with pytest.raises(UserError) as caught:
        train.train(small, run, log=quiet)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_is_wrong_with_a_bucket_is_said(small, bucket, bucket_server):
    said = error_of(small, "gs://not-there/run")
    assert "run folder gs://not-there/run cannot be written" in said
    assert "there is no bucket gs://not-there for these credentials" in said
    bucket_server.fault = lambda kind, _: 403 if kind == "write" else None
    assert "ask for the right to read and to write" in error_of(small, bucket)
    bucket_server.fault = lambda *_: 401
    assert "gcloud auth application-default login" in error_of(small, bucket)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "kinds"), [(401, ()), (403, ("write", "delete"))])
def test_rights_that_are_lost_in_the_midst(
    experiment, straight, bucket, bucket_server, status, kinds
):
    """One line, whichever of Orbax's threads meets it; with them again it goes on."""
    words = [sys.executable, "-m", "gamayun_jax", "train", str(experiment)]
    words += ["--workdir", bucket]

    def fault(kind, name):
        begun = any("checkpoints/6" in name for _, name in bucket_server.log)
        return status if begun and (not kinds or kind in kinds) else None

    bucket_server.fault = fault
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    said = [x for x in run.stderr.splitlines() if "google_auth_provider" not in x]
    assert len(said) == 1, run.stderr
    assert said[0].startswith("gamayun: ")
    assert str(status) in said[0] or "gs://runs may not be used so" in said[0]
    bucket_server.fault = lambda *_: None
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert leaves(bucket) == leaves(straight)


@pytest.mark.slow
def test_who_lost_the_folder_writes_no_more(small, straight, bucket, monkeypatch):
    """Another process took it over in the midst."""
    path = as_path(bucket) / ".lock"
    monkeypatch.setattr("gamayun_jax.lease.LEASE", 3.0)

    def log(text):
        if "step 7/" in text and "left" in text:
            path.write_text('{"host": "far", "pid": 7, "id": "z"}')
            time.sleep(2.0)

    with pytest.raises(LostError, match=r"far \(process 7\) took it over"):
        train.train(small, bucket, log=log, own_process=False)
    assert max(run_folder.checkpoint_steps(as_path(bucket))) < 9
    path.unlink()
    assert train.train(small, bucket, log=quiet) == 0
    assert leaves(bucket) == leaves(straight)
    assert records(bucket) == records(straight)


@pytest.mark.slow
def test_several_processes(experiment, bucket, tmp_path):
    """Two train in one bucket; one is killed, all go on, and the end is the same."""
    here, there = tmp_path / "run", as_path(bucket)
    assert [s for _, s in finish(start_all(experiment, here, 2))] == [0, 0]
    processes = start_all(experiment, there, 2)
    while not run_folder.checkpoint_steps(there):
        assert processes[0].poll() is None
        time.sleep(0.2)
    processes[1].kill()
    finish(processes)
    ends = finish(start_all(experiment, there, 2))
    assert [s for _, s in ends] == [0, 0], ends
    assert leaves(there) == leaves(here)
    assert records(there) == records(here)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket")  # those cut short
def test_short_troubles_cost_nothing(small, straight, bucket, bucket_server):
    """One request in a hundred is answered with 503 or 429, or cut short."""
    count, lock = iter(range(10**9)), threading.Lock()

    def fault(kind, name):
        with lock:
            number = next(count)
        return None if number % 100 else (503, 429, "cut")[number // 100 % 3]

    bucket_server.fault = fault
    assert train.train(small, bucket, log=quiet) == 0
    bucket_server.fault = lambda *_: None
    assert leaves(bucket) == leaves(straight)
    assert records(bucket) == records(straight)
