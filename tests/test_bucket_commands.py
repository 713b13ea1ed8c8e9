"""Runs, models and corpora in a bucket: commands give what they give on a disk."""

import contextlib
import dataclasses
import itertools
import json
import re

import pytest

from gamayun_jax import cli, train
from gamayun_jax.data.copy_corpus import copy_corpus
from gamayun_jax.storage import as_path, upload
from gamayun_jax.training.checkpoint import Checkpoints
from gamayun_jax.training.run_folder import find_checkpoint
from gamayun_jax.training.spool import metric_lines


def quiet(text):
    pass


@pytest.fixture(scope="module")
def local_run(config, tmp_path_factory):
    """A finished run of the small config."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train.train(config, folder, log=quiet) == 0
    return folder


@pytest.fixture
def remote(bucket, config):
    """The small config, with its corpus in a bucket."""
    copy_corpus(config.data.corpus, f"{bucket}/corpus", quiet)
    data = dataclasses.replace(config.data, corpus=f"{bucket}/corpus")
    return dataclasses.replace(config, data=data)


def said(words, capsys):
    """What a command prints; it must succeed."""
    status = cli.main([str(w) for w in words])
    told = capsys.readouterr()
    assert status == 0, told.err
    return told.out


def same_but_places(*texts):
    """Texts without the folders in them, and what they say of time."""
    plain = [re.sub(r"(gs://|/tmp/)[\w./\-]*", "", text) for text in texts]
    assert plain[0] == plain[1]


def made_by(run):
    """Metrics without times, evaluations, checksums of the last checkpoint's arrays."""
    run = as_path(run)
    lines = [row for _, row in metric_lines(run)]
    evals = {p.name: json.loads(p.read_text()) for p in (run / "eval").glob("*.json")}
    folder, step = find_checkpoint(run)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as store:
        sums = store.meta(step).checksums
    return [{k: v for k, v in x.items() if k != "time"} for x in lines], evals, sums


@pytest.mark.slow
def test_a_run_whose_corpus_and_folder_are_in_a_bucket(
    local_run, remote, bucket, bucket_server
):
    """The same records, evaluations and parameters bit for bit, while one request in
    nine is refused for a moment, cut or late."""
    number = itertools.count(1)
    faults = itertools.cycle((503, 429, "cut", 0.05, 500))

    def fault(kind, target):
        passing = kind == "read" and next(number) % 9 == 0
        return next(faults) if passing else None

    bucket_server.fault = fault
    assert train.train(remote, f"{bucket}/run", log=quiet) == 0
    assert next(number) > 100
    bucket_server.fault = lambda *_: None
    assert made_by(f"{bucket}/run") == made_by(local_run)


@pytest.mark.slow
def test_commands_on_a_run_in_a_bucket(
    local_run, remote, bucket, config, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = f"{bucket}/run"
    upload(local_run, as_path(run))
    here, there = tmp_path / "here", f"{bucket}/there"
    pairs = ((local_run, here), (run, there))
    for words in (
        ["eval", "RUN", "--languages", "ru", "tr", "--out", "OUT/eval"],
        ["generate", "RUN", "--prompt", "To open", "--max-tokens", "4"],
        ["align", "RUN", "--out", "OUT/align"],
        ["forgetting", "RUN", "--examples", "4"],
        ["report", "RUN"],
        ["report", "RUN", "--out", "OUT/report"],
        ["average", "RUN", "OUT/average", "--last", "2"],
        ["eval", "OUT/average", "--languages", "ru"],
        ["quantize", "RUN", "OUT/int8", "--bits", "8"],
        ["eval", "OUT/int8", "--languages", "ru"],
        ["export-hf", "RUN", "OUT/hf"],
        ["import-hf", "OUT/hf", "OUT/imported"],
        ["generate", "OUT/imported", "--prompt", "To open", "--max-tokens", "4"],
        ["generate", "OUT/hf", "--prompt", "To open", "--max-tokens", "4"],
        ["compare", "OUT/eval", "OUT/eval", "--out", "OUT/compared"],
        ["tokenizer", "report", "CORPUS", "--model", "OUT/hf"],
        ["corpus", "inspect", "CORPUS"],
    ):
        told = []
        for path, out in pairs:
            corpus = remote.data.corpus if path == run else config.data.corpus
            given = [
                w.replace("RUN", str(path))
                .replace("OUT", str(out))
                .replace("CORPUS", corpus)
                for w in words
            ]
            told.append(said(given, capsys))
        same_but_places(*told)
    for path in sorted(here.rglob("*")):
        if path.is_file() and path.parent.name != "d":  # a name made up by Orbax
            name = path.relative_to(here)
            assert (as_path(there) / name).is_file(), name
            if path.suffix in (".safetensors", ".png", ".jsonl"):
                copy = as_path(there) / name
                assert copy.read_bytes() == path.read_bytes(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here"]
    assert (as_path(run) / "report" / "index.html").is_file()
