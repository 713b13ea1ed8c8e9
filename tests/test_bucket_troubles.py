"""Slow buckets, silent ones and refusals: what passes costs time alone, what stays is
told in one line, by what the answer says and not by words in it."""

import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types

import aiohttp
import google.auth.exceptions
import numpy as np
import pytest
from botocore.exceptions import (
    ClientError,
    LoginRefreshRequired,
    NoAuthTokenError,
    NoCredentialsError,
    UnknownTokenProviderError,
)
from conftest import slow_but
from gcsfs.retry import HttpError
from google.api_core.exceptions import Forbidden, ServiceUnavailable

from gamayun_jax import buckets, cli, train
from gamayun_jax.config import UserError
from gamayun_jax.data import records
from gamayun_jax.data.copy_corpus import copy_corpus
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.files import file_sha256
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.fields import BUCKETS
from gamayun_jax.plan.preemption import measured_times
from gamayun_jax.storage import as_path, local_file

SILENT = 0.3  # seconds; a slow answer takes longer, with pauses of a sixth


@pytest.fixture
def folder(bucket, monkeypatch):
    """An empty folder of a bucket, by a client that waits little."""
    path = as_path(bucket)
    short = aiohttp.ClientTimeout(total=None, sock_read=SILENT)
    monkeypatch.setattr(path.fs, "requests_timeout", short)

    async def sleep(seconds):
        pass

    quick = types.SimpleNamespace(sleep=sleep)
    monkeypatch.setattr("gcsfs.retry.asyncio", quick)
    return path


def test_requests_are_bounded(bucket):
    limits = as_path(bucket).fs.requests_timeout
    assert (limits.total, limits.sock_connect, limits.sock_read) == (None, 10, 30)
    assert as_path(bucket).fs.retries == buckets.ATTEMPTS


def test_a_slow_answer_is_waited_for(folder, bucket_server):
    data = np.random.default_rng(0).bytes(1_000_000)
    (folder / "x").write_bytes(data)
    bucket_server.fault = lambda kind, _: "slow" if kind == "read" else None
    bucket_server.reset()
    assert (folder / "x").read_bytes() == data
    assert local_file(folder / "x").read_bytes() == data
    assert bucket_server.counts["read"] == 2


def test_the_loader_gets_the_same_from_a_slow_bucket(folder, config, bucket_server):
    copy_corpus(config.data.corpus, folder, lambda _: None)
    data = dataclasses.replace(config.data, corpus=str(folder))
    number = itertools.count()
    bucket_server.fault = lambda kind, _: "slow" if next(number) % 5 == 0 else None
    steps = []
    for cfg in (config, dataclasses.replace(config, data=data)):
        corpus = open_corpus(cfg.data.corpus)
        batches = LocalBatches(cfg, corpus, make_data_plan(cfg, corpus), np.arange(4))
        steps.append([batches[k] for k in range(3)])
    assert next(number) > 20
    for here, there in zip(*steps, strict=True):
        for name in here:
            np.testing.assert_array_equal(here[name], there[name])


OPERATIONS = {
    "read": lambda path: path.read_bytes(),
    "stream": lambda path: file_sha256(path),
    "size": lambda path: path.size(),
    "exists": lambda path: path.exists(),
    "list": lambda path: [p.name for p in path.parent.iterdir()],
    "below": lambda path: list(buckets.listed_sizes(path.parent)),
    "write": lambda path: path.write_bytes(b"abc"),
    "delete": lambda path: path.unlink(),
}


@pytest.mark.parametrize("fault", slow_but(503, of=(429, 500, 503, "hang", "cut")))
def test_what_passes_is_outlived(folder, bucket_server, fault):
    """A burst of the same at each operation."""
    path = folder / "x"
    for name, operation in OPERATIONS.items():
        path.write_bytes(b"abc")
        expected = operation(path)
        path.write_bytes(b"abc")
        # A second deletion finds nothing, where the answer to the first was lost.
        burst = iter([fault] * 3 if (name, fault) != ("delete", "cut") else [])
        bucket_server.fault = lambda *_, burst=burst: next(burst, None)
        assert operation(path) == expected, name
        assert next(burst, None) is None, name
        bucket_server.fault = lambda *_: None


@pytest.mark.slow
@pytest.mark.parametrize("fault", [503, "hang", 403, 401])
def test_what_stays_is_an_error_of_one_line(folder, bucket_server, fault):
    """Never the answer that there is nothing."""
    path = folder / "x"
    path.write_bytes(b"abc")
    for name, operation in OPERATIONS.items():
        if fault == "hang" and name not in ("read", "list", "write"):
            continue  # it takes its time
        bucket_server.fault = lambda *_: fault
        bucket_server.reset()
        with pytest.raises(OSError) as caught:
            operation(path)
        error = caught.value
        assert str(error.filename).startswith(str(folder)), name
        assert error.strerror, name
        assert len(error.strerror.splitlines()) == 1, name
        assert isinstance(error, PermissionError) == (fault in (401, 403)), name
        # Of one request: an operation makes several, and of those that another has left
        # under way, or the test before, one may come late.
        made = collections.Counter(r for r in bucket_server.log if folder.name in r[1])
        tries = max(made.values())
        again = fault in (503, "hang")
        assert tries >= buckets.ATTEMPTS if again else tries < buckets.ATTEMPTS, name
    bucket_server.fault = lambda *_: None
    with pytest.raises(FileNotFoundError, match="there is no such object"):
        (folder / "y").read_bytes()


def test_a_file_that_stops_in_the_midst(folder, bucket_server, monkeypatch):
    """Opening it is not all that may fail."""
    monkeypatch.setattr(buckets, "PIECE", 1000)
    path = folder / "x"
    path.write_bytes(bytes(5000))
    with path.open("rb") as file:
        assert len(file.read(1500)) == 1500
        bucket_server.fault = lambda *_: "hang"
        with pytest.raises(OSError, match=r"see to the network.*gs://.*/x"):
            file.read()
        bucket_server.fault = lambda *_: None
        assert len(file.read()) == 3500 - 500
        assert file.seek(4999) == 4999
        assert file.read() == b"\0"


def test_a_command_on_a_silent_bucket_ends_with_a_line(
    folder, config, bucket_server, monkeypatch, capsys
):
    copy_corpus(config.data.corpus, folder, lambda _: None)
    monkeypatch.setattr(records, "REQUEST_SECONDS", SILENT)
    bucket_server.fault = lambda kind, _: "hang" if kind == "read" else None
    assert cli.main(["corpus", "inspect", str(folder)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1, told.err
    assert "see to the network" in told.err


# Of each kind of command, one that reads and one that writes.
COMMANDS = {
    "reads": (
        ["corpus", "inspect", "BUCKET/corpus"],
        ["corpus", "copy", "BUCKET/corpus", "HERE/corpus"],
        ["tokenizer", "report", "BUCKET/corpus"],
        [
            "train",
            "CONFIG",
            "--workdir",
            "HERE/a",
            "--set",
            "data.corpus=BUCKET/corpus",
        ],
        ["train", "CONFIG", "--workdir", "HERE/a", "--init-from", "BUCKET/run"],
        ["eval", "BUCKET/run"],
        ["eval", "HERE/run", "--corpus", "BUCKET/corpus"],
        ["generate", "BUCKET/run", "--prompt", "a"],
        ["report", "BUCKET/run"],
        ["export-hf", "BUCKET/run", "HERE/hf"],
        ["average", "BUCKET/run", "HERE/average", "--last", "2"],
        ["plan", "CONFIG", "--topology", "v5e:2x2", "--measured", "BUCKET/run"],
    ),
    "writes": (
        ["corpus", "copy", "CORPUS", "BUCKET/corpus"],
        ["train", "CONFIG", "--workdir", "BUCKET/run"],
        ["eval", "HERE/run", "--out", "BUCKET/eval"],
        ["report", "HERE/run", "--out", "BUCKET/report"],
        ["export-hf", "HERE/run", "BUCKET/hf"],
        ["average", "HERE/run", "BUCKET/average", "--last", "2"],
    ),
}
TROUBLES = {
    "missing": (None, "there is no bucket gs://not-there for these credentials"),
    "no credentials": (401, "gcloud auth application-default login"),
    "forbidden": (403, "ask for the right to read and to write objects"),
}


def files_below(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_commands_on_a_bucket_that_is_not_for_us(
    folder, experiment, config, bucket_server, tmp_path, capsys, trouble, kind
):
    """A line, status 2, and nothing written on this machine."""
    here = tmp_path / "here"
    here.mkdir()
    assert train.train(config, here / "run", log=lambda _: None) == 0
    before = files_below(here)
    fault, reason = TROUBLES[trouble]
    places = {
        "BUCKET": "gs://not-there" if trouble == "missing" else str(folder),
        "CONFIG": str(experiment),
        "CORPUS": config.data.corpus,
        "HERE": str(here),
    }
    bucket_server.fault = lambda *_: fault
    capsys.readouterr()
    for words in COMMANDS[kind]:
        given = []
        for word in words:
            for name, place in places.items():
                word = word.replace(name, place)
            given.append(word)
        assert cli.main(given) == 2, words
        told = capsys.readouterr().err
        lines = [x for x in told.splitlines() if x.startswith("gamayun: ")]
        assert len(lines) == 1, (words, told)
        assert reason in lines[0], words
        assert "Traceback" not in told
    assert files_below(here) == before


def test_a_corpus_is_built_here_and_copied(folder, experiment, bucket_server, capsys):
    assert cli.main(["corpus", "build", str(experiment), "--out", str(folder)]) == 2
    advice = f"give a local folder, then `gamayun corpus copy FOLDER {folder}`"
    assert advice in capsys.readouterr().err
    assert not folder.exists()


def test_a_plan_measured_by_a_run_in_a_bucket(folder, tmp_path):
    times = {"start": 4.0, "compile": 2.0, "checkpoint": 6.0}
    lineage = {"events": [{"event": "resumed"}], "checkpoints": [{}, {}]}
    for run in (tmp_path, folder):
        (run / "goodput.json").write_text(json.dumps(times))
        (run / "lineage.json").write_text(json.dumps(lineage))
        assert measured_times(run) == (3.0, 3.0)
    (folder / "goodput.json").unlink()
    with pytest.raises(UserError, match="no record of a run's time"):
        measured_times(folder)


def test_every_kind_of_bucket_has_all_it_needs():
    assert set(BUCKETS) == set(buckets.LOGIN)


def amazon(status, code, text="no"):
    return ClientError(
        {
            "Error": {"Code": code, "Message": text},
            "ResponseMetadata": {"HTTPStatusCode": status},
        },
        "PutObject",
    )


def raised_from(error, cause):
    error.__cause__ = cause
    return error


REASONS = {
    "no valid credentials": [
        HttpError({"code": 401, "message": "Anonymous caller"}),
        google.auth.exceptions.DefaultCredentialsError("none were found"),
        google.auth.exceptions.RefreshError("invalid_grant"),
        raised_from(PermissionError("no"), amazon(403, "InvalidAccessKeyId")),
        NoCredentialsError(),
        LoginRefreshRequired(),
        NoAuthTokenError(),
        UnknownTokenProviderError(name="x", provider="y", provider_type="z"),
    ],
    "may not be used so": [
        OSError("Forbidden: b/x/o\nno"),
        Forbidden("no"),
        raised_from(PermissionError("no"), amazon(403, "AccessDenied")),
    ],
    "refuses this machine's clock": [
        raised_from(PermissionError("no"), amazon(403, "RequestTimeTooSkewed"))
    ],
    "see to the network": [
        # Numbers and words in a text are not what was answered.
        HttpError({"code": 503, "message": "object 404, part 403, code 401: denied"}),
        ServiceUnavailable("anonymous credential forbidden 404"),
        aiohttp.SocketTimeoutError("Timeout on reading data from socket"),
        raised_from(OSError("no"), amazon(503, "SlowDown")),
        OSError(111, "Connection refused", None),
        TimeoutError(),
    ],
}


def test_reasons_are_those_of_the_answer(bucket):
    for said, errors in REASONS.items():
        for error in errors:
            told = buckets.reason_of(error, as_path(bucket))
            assert said in told, (error, told)
            assert "\n" not in told
    missing = FileNotFoundError("b/x/o")
    assert "no such object" in buckets.reason_of(missing, as_path(bucket))
    there = as_path("gs://not-there/x")
    assert "no bucket gs://not-there" in buckets.reason_of(missing, there)


@pytest.mark.slow
def test_a_checkpoint_that_hangs_is_sent_again(bucket, bucket_server, tmp_path):
    """Orbax writes by TensorStore, whose requests have a limit too."""
    code = f"""
import numpy as np, orbax.checkpoint as ocp
from gamayun_jax.storage import as_path
with ocp.StandardCheckpointer() as store:
    store.save(as_path("{bucket}/c").fs and "{bucket}/c", {{"x": np.arange(1000)}})
"""
    hangs = iter(["hang"] * 2)
    bucket_server.fault = lambda kind, name: (
        next(hangs, None) if kind == "write" and "/d/" in name else None
    )
    env = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert next(hangs, None) is None
