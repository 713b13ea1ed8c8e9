"""A corpus in a bucket: what is read is what a disk has, at few requests, through what
passes; what is wrong is told in a line."""

import dataclasses
import json
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from gamayun_jax import cli
from gamayun_jax.config import UserError
from gamayun_jax.data import records as records_module
from gamayun_jax.data.copy_corpus import copy_corpus
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.loader import LocalBatches, local_batches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.data.records import BadRecordError
from gamayun_jax.storage import as_path, local_file, upload_file


@pytest.fixture
def corpus(bucket, config, bucket_server):
    """The address of the small corpus in a bucket."""
    copy_corpus(config.data.corpus, f"{bucket}/corpus", lambda _: None)
    bucket_server.reset()
    return f"{bucket}/corpus"


def at(cfg, corpus, **changes):
    return dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, corpus=corpus, **changes)
    )


def test_all_of_a_corpus_is_as_on_a_disk(corpus, config, bucket_server):
    here, there = open_corpus(config.data.corpus), open_corpus(corpus)
    shards = sum(len(s.shards) for s in there.sources.values())
    assert bucket_server.counts["list"] <= 3 < shards
    assert str(there.folder) == corpus
    assert there.contents() == here.contents()
    assert there.tokenizer().fingerprint == here.tokenizer().fingerprint
    assert there.heldout("udhr", "tr") == here.heldout("udhr", "tr")
    for name in here.sources:
        assert there.examples(64) == here.examples(64)
        np.testing.assert_array_equal(there.token_counts(name), here.token_counts(name))
        bucket_server.reset()
        found = pickle.loads(pickle.dumps(there.records(name)))
        np.testing.assert_array_equal(found[3], here.records(name)[3])
        assert bucket_server.counts == {"read": 1}
        assert bucket_server.received == 2 * 65 + records_module.CHECKSUM
    assert there.table().text() == here.table().text()


def test_batches_are_those_of_a_disk_through_what_passes(
    corpus, config, bucket_server, monkeypatch
):
    """Refusals, cut answers and slow ones, one in four requests."""
    monkeypatch.setattr(records_module, "REQUEST_SECONDS", 2.0)
    lock, number = threading.Lock(), [0]
    faults = [429, 503, "cut", 500, 0.05, 408]

    def fault(kind, target):
        with lock:
            number[0] += 1
            return faults[number[0] // 4 % len(faults)] if number[0] % 4 == 0 else None

    there = open_corpus(corpus)
    cfg = at(config, corpus)
    plan = make_data_plan(cfg, there)
    here = open_corpus(config.data.corpus)
    expected = LocalBatches(config, here, make_data_plan(config, here), np.arange(8))
    bucket_server.fault = fault
    found = local_batches(cfg, there, plan, np.arange(8), 0)
    for step, batch in zip(range(10), found, strict=False):
        for name, values in expected[step].items():
            np.testing.assert_array_equal(batch[name], values, err_msg=name)
    assert number[0] > 80


def test_a_bucket_that_is_away_is_waited_for(corpus, bucket_server):
    name = "ru/help"
    found = open_corpus(corpus).records(name, retry_seconds=60)
    expected = found[0]
    bucket_server.fault = lambda *_: 403
    timer = threading.Timer(1.0, setattr, (bucket_server, "fault", lambda *_: None))
    timer.start()
    np.testing.assert_array_equal(found[0], expected)
    timer.join()
    bucket_server.fault = lambda *_: 403
    gone = open_corpus_quietly(corpus, bucket_server).records(name, retry_seconds=0.2)
    with pytest.raises(BadRecordError, match=r"gs://.*PERMISSION_DENIED.*, for \d+ s"):
        gone[0]


def open_corpus_quietly(corpus, server):
    fault, server.fault = server.fault, lambda *_: None
    try:
        return open_corpus(corpus)
    finally:
        server.fault = fault


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_shard_is_named(corpus, bucket_server, damage):
    opened = open_corpus(corpus)
    shard = as_path(opened.sources["ru/help"].shards[0])
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(bytes(data[: len(data) // 2]))
    else:
        data[5] ^= 4
        shard.write_bytes(bytes(data))
    records = opened.records("ru/help", retry_seconds=0.0)
    bad = 0 if damage == "changed" else len(data) // 134 - 1
    with pytest.raises(BadRecordError, match=f"shard {shard}, record {bad}: "):
        records[bad]
    if damage == "changed":
        records[1]
        return
    said = r"is missing: copy" if damage == "missing" else "records|is damaged"
    with pytest.raises(UserError, match=f"shard {shard} .*({said})"):
        open_corpus(corpus)
    assert list(open_corpus(corpus, set_aside=True).damaged) == [str(shard)]


def test_what_is_no_corpus_there(corpus, bucket, tmp_path):
    with pytest.raises(UserError, match=r"no corpus in gs://.*gamayun corpus copy"):
        open_corpus(f"{bucket}/nothing")
    manifest = as_path(corpus) / "manifest.json"
    former = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(former | {"format": 1}))
    with pytest.raises(UserError, match=r"ArrayRecord shards .* copy it to a disk"):
        open_corpus(corpus)
    source = former["sources"]["ru/help"]
    source["shards"][0]["file"] = "../other/00000.records"
    manifest.write_text(json.dumps(former))
    with pytest.raises(UserError, match="names a shard outside of the corpus"):
        open_corpus(corpus)


def test_large_objects(bucket, tmp_path):
    """Beyond what one request of gcsfs, or a buffer of aiohttp, takes."""
    data = np.random.default_rng(0).bytes(12_000_000)
    (tmp_path / "x").write_bytes(data)
    upload_file(tmp_path / "x", as_path(bucket) / "x")
    (as_path(bucket) / "y").write_bytes(data)
    assert local_file(as_path(bucket) / "x").read_bytes() == data
    assert (as_path(bucket) / "y").read_bytes() == data


def test_a_copy_goes_on_and_ends_with_the_manifest(config, bucket, bucket_server):
    out = f"{bucket}/copy"
    words = ["corpus", "copy", config.data.corpus, out]
    writes = []

    def fault(kind, target):
        if kind == "write":
            writes.append(target)
        return 403 if kind == "write" and len(writes) > 6 else None

    bucket_server.fault = fault
    assert cli.main(words) == 2
    assert not (as_path(out) / "manifest.json").exists()
    with pytest.raises(UserError, match="no corpus in"):
        open_corpus(out)
    bucket_server.fault = lambda *_: None
    bucket_server.reset()
    assert cli.main(words) == 0
    written = [name for kind, name in bucket_server.log if kind == "write"]
    assert written[-1].endswith("copy/manifest.json")
    files = [p for p in Path(config.data.corpus).rglob("*") if p.is_file()]
    assert len(written) < len(files)
    assert sorted(str(p)[len(out) :] for p in as_path(out).rglob("*")) == sorted(
        str(p)[len(config.data.corpus) :] for p in files
    )
    bucket_server.reset()
    assert cli.main(words) == 0  # again: nothing of the texts
    written = [name for kind, name in bucket_server.log if kind == "write"]
    assert not [name for name in written if not name.endswith((".json", ".tmp"))]


def test_a_copy_back_is_the_same_and_damage_is_found(corpus, config, tmp_path, capsys):
    assert cli.main(["corpus", "copy", corpus, str(tmp_path / "back")]) == 0
    for path in Path(config.data.corpus).rglob("*"):
        if path.is_file():
            back = tmp_path / "back" / path.relative_to(config.data.corpus)
            assert back.read_bytes() == path.read_bytes()
    shard = as_path(open_corpus(corpus).sources["ru/help"].shards[0])
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    for out, said in (
        (tmp_path / "new", f"{shard} has another SHA-256"),
        (f"{corpus}2", "between buckets copies"),
    ):
        assert cli.main(["corpus", "copy", corpus, str(out)]) == 2
        assert said in (error := capsys.readouterr().err)
        assert error.count("gamayun:") == 1
    (tmp_path / "back" / "manifest.json").write_text("{}")
    assert cli.main(["corpus", "copy", corpus, str(tmp_path / "back")]) == 2
    assert "there is another corpus in" in capsys.readouterr().err
