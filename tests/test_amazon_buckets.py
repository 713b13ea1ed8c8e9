"""What is promised of s3://, on moto's server: corpora, models in Hugging Face's
format, results and pages. Runs and checkpoints are refused before anything is written.
"""

import dataclasses
import itertools

import fsspec
import gcsfs
import numpy as np
import pytest
import s3fs

from gamayun_jax import buckets, cli, train
from gamayun_jax.config import UserError
from gamayun_jax.data.copy_corpus import copy_corpus
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.interop.huggingface import export_hf, import_hf
from gamayun_jax.storage import as_path
from gamayun_jax.training.run_folder import RunFolder, find_checkpoint
from gamayun_jax.training.spool import metric_lines


def quiet(text):
    pass


@pytest.fixture
def proxy(amazon_server, amazon_bucket):
    return amazon_server[0]


@pytest.fixture
def corpus(amazon_bucket, config, proxy):
    copy_corpus(config.data.corpus, f"{amazon_bucket}/corpus", quiet)
    proxy.reset()
    return f"{amazon_bucket}/corpus"


def at(cfg, corpus):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, corpus=corpus))


def test_a_corpus_goes_there_and_back(corpus, config, tmp_path, capsys):
    assert cli.main(["corpus", "inspect", corpus]) == 0
    assert "ru/help" in capsys.readouterr().out
    assert cli.main(["corpus", "copy", corpus, str(tmp_path / "back")]) == 0
    assert open_corpus(tmp_path / "back", hashes=True).contents() == (
        open_corpus(config.data.corpus).contents()
    )


def test_batches_are_those_of_a_disk(corpus, config, proxy):
    """One request in five is refused for a moment, cut or slow."""
    faults = itertools.cycle([503, 500, "cut", 0.05, "slow"])
    number = itertools.count(1)
    proxy.fault = lambda *_: next(faults) if next(number) % 5 == 0 else None
    steps = []
    for cfg in (config, at(config, corpus)):
        opened = open_corpus(cfg.data.corpus)
        batches = LocalBatches(cfg, opened, make_data_plan(cfg, opened), np.arange(4))
        steps.append([batches[k] for k in range(3)])
    assert next(number) > 20
    for here, there in zip(*steps, strict=True):
        for name in here:
            np.testing.assert_array_equal(here[name], there[name])


def test_requests_are_bounded(amazon_bucket):
    fs = as_path(amazon_bucket).fs
    given = fs.config_kwargs
    assert (given["connect_timeout"], given["read_timeout"]) == (10, 30)
    assert given["retries"]["total_max_attempts"] == buckets.ATTEMPTS
    assert fs.retries == 2  # each of so many attempts


def test_what_the_user_configures_stays(monkeypatch):
    """Under either name of a scheme; with ours where the user says nothing."""
    user = {
        "gs": {"requests_timeout": 7, "use_listings_cache": True},
        "s3": {"config_kwargs": {"read_timeout": 5}, "profile": "a"},
        "s3a": {"profile": "b"},
    }
    monkeypatch.setattr(fsspec.config, "conf", user)
    buckets._configure()
    google = fsspec.config.apply_config(gcsfs.GCSFileSystem, {})
    assert google == {"requests_timeout": 7, "use_listings_cache": True}
    amazon = fsspec.config.apply_config(s3fs.S3FileSystem, {})
    assert amazon["profile"] == "b"
    assert amazon["use_listings_cache"] is False
    given = amazon["config_kwargs"]
    assert (given["connect_timeout"], given["read_timeout"]) == (10, 5)


@pytest.fixture
def quick(amazon_bucket, monkeypatch):
    """A folder by a client that waits little and asks twice."""
    limits = {"read_timeout": 0.3, "retries": {"max_attempts": 1}}
    fs = fsspec.filesystem("s3", config_kwargs=limits, skip_instance_cache=True)
    fs.retries = 2
    monkeypatch.setattr(buckets.fsspec_backend, "fs", lambda path: fs)
    return as_path(amazon_bucket)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [503, 429, "hang", "cut"])
def test_what_passes_is_outlived(quick, proxy, fault):
    (quick / "x").write_bytes(b"abc")
    for operation in (
        lambda: (quick / "x").read_bytes(),
        lambda: (quick / "x").open("rb").read(),
        lambda: (quick / "x").exists(),
        lambda: [p.name for p in quick.iterdir()],
        lambda: (quick / "x").write_bytes(b"abc"),
    ):
        expected = operation()
        burst = iter([fault])
        proxy.fault = lambda *_, burst=burst: next(burst, None)
        assert operation() == expected
        assert next(burst, None) is None
        proxy.fault = lambda *_: None


@pytest.mark.slow
@pytest.mark.parametrize("fault", [503, "hang", 403])
def test_what_stays_is_an_error_of_one_line(quick, proxy, fault):
    (quick / "x").write_bytes(b"abc")
    proxy.fault = lambda *_: fault
    for operation in (
        lambda: (quick / "x").read_bytes(),
        lambda: (quick / "x").exists(),
        lambda: (quick / "x").write_bytes(b"abc"),
    ):
        with pytest.raises(OSError) as caught:
            operation()
        assert caught.value.filename == str(quick / "x")
        assert len(caught.value.strerror.splitlines()) == 1
        assert isinstance(caught.value, PermissionError) == (fault == 403)


def test_what_is_not_there(amazon_bucket, config, capsys):
    with pytest.raises(FileNotFoundError, match="there is no such object"):
        (as_path(amazon_bucket) / "y").read_bytes()
    words = ["corpus", "copy", config.data.corpus, "s3://not-there/corpus"]
    assert cli.main(words) == 2
    assert "there is no bucket s3://not-there" in capsys.readouterr().err


def test_runs_are_refused_before_anything_is_written(
    amazon_bucket, config, experiment, proxy, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = f"{amazon_bucket}/run"
    for call in (
        lambda: RunFolder(run),
        lambda: train.train(config, run, log=quiet),
    ):
        with pytest.raises(UserError, match=r"Orbax, which knows disks and gs://"):
            call()
    for words in (
        ["train", str(experiment), "--workdir", run],
        ["average", "here", run, "--last", "2"],
        ["quantize", "here", run],
        ["import-hf", "here", run],
    ):
        assert cli.main(words) == 2
        told = capsys.readouterr().err
        assert told.count("gamayun: ") == 1
        assert "Orbax, which knows disks and gs://" in told
    assert proxy.counts["write"] == 0
    (as_path(run) / "checkpoints" / "1" / "meta" / "x").write_bytes(b"")
    with pytest.raises(UserError, match=r"Orbax, which knows disks and gs://"):
        find_checkpoint(run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_on_a_disk_with_all_else_there(
    corpus, config, amazon_bucket, tmp_path, capsys
):
    """The same records, from a corpus at s3://; results, pages and models go there."""
    runs = [tmp_path / "here", tmp_path / "there"]
    for run, cfg in zip(runs, (config, at(config, corpus)), strict=True):
        assert train.train(cfg, run, log=quiet) == 0
    records = [
        [
            {k: v for k, v in row.items() if k not in ("time", "hosts")}
            for _, row in metric_lines(run)
        ]
        for run in runs
    ]
    assert records[0] == records[1]
    model = f"{amazon_bucket}/hf"
    for words in (
        ["eval", runs[1], "--languages", "tr", "--out", f"{amazon_bucket}/eval"],
        ["report", runs[1], "--out", f"{amazon_bucket}/report"],
        ["export-hf", runs[1], model],
        ["eval", model, "--corpus", corpus, "--languages", "tr"],
        ["tokenizer", "report", corpus, "--model", model],
    ):
        assert cli.main([str(w) for w in words]) == 0, capsys.readouterr().err
    export_hf(runs[1], tmp_path / "hf")
    copy = as_path(model) / "model.safetensors"
    assert copy.read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert import_hf(model, tmp_path / "imported")["parameters"]
