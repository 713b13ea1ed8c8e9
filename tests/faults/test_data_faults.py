"""Shards that are cut, gone, changed or away for a while; ids that are none."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_corpora import write_shard

from gamayun_jax import train
from gamayun_jax.config import UserError
from gamayun_jax.data import records as records_module
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.loader import LocalBatches
from gamayun_jax.data.plan import make_data_plan
from gamayun_jax.data.records import BadRecordError


def quiet(text):
    pass


@pytest.fixture
def copy(config, tmp_path):
    """The config with a corpus of its own, to damage; and a shard of it."""
    folder = tmp_path / "corpus"
    shutil.copytree(config.data.corpus, folder)
    cfg = dataclasses.replace(
        config, data=dataclasses.replace(config.data, corpus=str(folder))
    )
    return cfg, Path(open_corpus(folder).sources["ru/help"].shards[0])


def policy(cfg, **changes):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def remove(shard):
    shard.unlink()


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_shard_that_is_not_whole_stops_and_is_named(copy, tmp_path, damage):
    cfg, shard = copy
    damage(shard)
    with pytest.raises(UserError, match=rf"shard {shard} (is missing|has \d+ records)"):
        train.train(cfg, tmp_path / "run", log=quiet)


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_shard_set_aside_is_padding_and_listed(copy, config, damage):
    cfg, shard = copy
    damage(shard)
    corpus = open_corpus(cfg.data.corpus, set_aside=True)
    assert list(corpus.damaged) == [str(shard)]
    cfg = policy(cfg, faults="set_aside")
    met = []
    plan, rows = make_data_plan(cfg, corpus), np.arange(8)
    found = LocalBatches(cfg, corpus, plan, rows, lambda *a: met.append(a))
    whole = open_corpus(config.data.corpus)
    expected = LocalBatches(config, whole, make_data_plan(config, whole), rows)
    aside = 0
    for step in range(13):
        got, want = found[step], expected[step]
        lost = ~got["loss_mask"].any(1)
        aside += int(lost.sum())
        # The others are as if nothing had happened.
        np.testing.assert_array_equal(got["inputs"][~lost], want["inputs"][~lost])
    assert aside == len(met) > 0
    assert {(source, file) for source, file, _, _ in met} == {("ru/help", str(shard))}


def test_a_changed_bit_is_named_with_its_record(copy):
    cfg, shard = copy
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    data = bytearray(shard.read_bytes())
    data[rng.randrange(len(data) // 4, len(data) // 2)] ^= 1 << rng.randrange(8)
    shard.write_bytes(data)
    records = open_corpus(cfg.data.corpus).records("ru/help")
    bad, said = [], ""
    for i in range(len(records)):
        try:
            records[i]
        except BadRecordError as e:
            bad.append(i)
            said = str(e)
    assert f"shard {shard}, record {bad[-1]}: " in said
    whole = [i for i in range(len(records)) if i not in bad]
    assert 1 <= len(bad) <= 2
    assert all(records[i].max() < 512 for i in whole[:20])


def test_ids_beyond_the_vocabulary(copy):
    cfg, shard = copy
    records = open_corpus(cfg.data.corpus).records("ru/help")
    rows = [records[i].astype("<u2") for i in range(len(records))]
    rows[5][7] = 60_000
    shards = open_corpus(cfg.data.corpus).sources["ru/help"].shards
    manifest = json.loads((Path(cfg.data.corpus) / "manifest.json").read_text())
    count = manifest["sources"]["ru/help"]["shards"][0]["records"]
    write_shard(shard, rows[:count])
    damaged = open_corpus(cfg.data.corpus).records("ru/help")
    with pytest.raises(
        UserError, match=rf"{shard}, record 5: token id 60000 is beyond the 512"
    ):
        damaged[5]
    np.testing.assert_array_equal(damaged[6], rows[6])
    assert shards[0] == str(shard)


def test_a_wrong_hash_is_found_when_asked(copy):
    cfg, shard = copy
    path = Path(cfg.data.corpus) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"]["ru/help"]["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert not open_corpus(cfg.data.corpus).damaged
    with pytest.raises(UserError, match=f"{shard} has another SHA-256"):
        open_corpus(cfg.data.corpus, hashes=True)
    found = open_corpus(cfg.data.corpus, set_aside=True, hashes=True)
    assert list(found.damaged) == [str(shard)]


def test_a_file_system_that_comes_back(copy):
    cfg, shard = copy
    away = shard.with_suffix(".away")
    os.rename(shard, away)
    records = open_corpus(cfg.data.corpus, set_aside=True).records("en/help")
    corpus = dataclasses.replace(
        open_corpus(cfg.data.corpus, set_aside=True), damaged={}
    )
    records = corpus.records("ru/help", retry_seconds=30.0)
    timer = threading.Timer(0.7, os.rename, (away, shard))
    timer.start()
    begin = time.monotonic()
    assert len(records[3]) == 65
    assert time.monotonic() - begin > 0.5
    timer.join()


def test_a_file_system_that_does_not_come_back(copy):
    cfg, shard = copy
    corpus = open_corpus(cfg.data.corpus)
    shard.unlink()
    records = corpus.records("ru/help", retry_seconds=0.3)
    with pytest.raises(BadRecordError, match=r"record 3: No such file.*for 0 s"):
        records[3]
    begin = time.monotonic()
    with pytest.raises(BadRecordError):
        records[4]  # no further waiting
    assert time.monotonic() - begin < 0.2


def test_a_shard_outside_of_the_corpus(copy):
    cfg, _ = copy
    path = Path(cfg.data.corpus) / "manifest.json"
    manifest = json.loads(path.read_text())
    row = manifest["sources"]["ru/help"]["shards"][0]
    row["file"] = "../" * 20 + "etc/passwd"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside of the corpus"):
        open_corpus(cfg.data.corpus)


@pytest.mark.parametrize("what", ["shard", "folder"])
def test_a_link_out_of_the_corpus(copy, tmp_path, what):
    """Refused; one inside of it is followed."""
    cfg, shard = copy
    link = shard if what == "shard" else shard.parent
    inside = Path(cfg.data.corpus) / "elsewhere"
    os.rename(link, inside)
    link.symlink_to(inside)
    assert len(open_corpus(cfg.data.corpus).records("ru/help")[0]) == 65
    os.rename(inside, tmp_path / "outside")
    link.unlink()
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="outside of the corpus"):
        open_corpus(cfg.data.corpus)


@pytest.mark.slow
def test_a_run_counts_what_it_set_aside(copy, tmp_path):
    cfg, shard = copy
    truncate(shard)
    run = tmp_path / "run"
    assert train.train(policy(cfg, faults="set_aside"), run, log=quiet) == 0
    lines = (run / "set_aside.0.jsonl").read_text().splitlines()
    rows = [json.loads(x) for x in lines]
    lineage = json.loads((run / "lineage.json").read_text())
    (event,) = [e for e in lineage["events"] if "set aside" in e["event"]]
    assert event["ru/help"] == len(rows) == len({r["record"] for r in rows}) > 0


# What runs where few files may be open: 200 shards, read by 4 threads.
FEW_FILES = """
import os, random, resource, sys
from concurrent.futures import ThreadPoolExecutor
from gamayun_jax.data.records import OPEN, Records

folder, soft, hard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
shards = [(f"{folder}/{k}", 3) for k in range(200)]
records = Records(shards, "uint16", 1000, 2, 2)
order = [i for i in range(600) for _ in range(3)]
random.Random(1).shuffle(order)
with ThreadPoolExecutor(4) as pool:
    rows = list(pool.map(lambda i: records[i].tolist(), order))
assert rows == [[i, i] for i in order]
opened = sum(
    os.path.realpath(f"/proc/self/fd/{n}").startswith(folder)
    for n in os.listdir("/proc/self/fd")
)
assert opened == len(OPEN), (opened, len(OPEN))
more = [open(os.devnull) for _ in range(hard // 3)]  # what a checkpoint needs
print(len(OPEN), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "kept"), [(64, 64, 32), (64, 96, 48), (64, 1000, 200)]
)
def test_more_shards_than_files_that_may_be_open(tmp_path, soft, hard, kept):
    for k in range(200):
        rows = [np.array([i, i], "<u2") for i in range(3 * k, 3 * k + 3)]
        write_shard(tmp_path / str(k), rows)
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == [str(kept), str(hard)]


def test_a_shard_that_is_used_stays_open():
    opened = []

    class Reader:
        def __init__(self, path):
            opened.append(path)

        def read(self, number):
            return b"%d" % number

    files = records_module.OpenShards(limit=3)
    for name in "abcadaea":
        assert files.read(name, 7, Reader) == b"7"
    assert opened == [*"abcde"]
    assert len(files) == 3
    files.forget("a")
    files.read("a", 0, Reader)
    assert opened == [*"abcdea"]


@pytest.mark.slow
def test_a_run_on_more_shards_than_files_that_may_be_open(tmp_path):
    command = [sys.executable, "-m", "gamayun_jax"]
    config = "tests/faults/small_run.py"
    folder = str(tmp_path / "corpus")
    few = ["--set", "corpus.shard_bytes=10000", "--out", folder]
    subprocess.run([*command, "corpus", "build", config, *few], check=True)
    assert len(list(Path(folder).rglob("*.records"))) > 300
    where = ["--set", f"data.corpus={folder}", "--workdir", str(tmp_path / "run")]
    # A shell sets the limit: a preexec_fn would fork this process with JAX's threads.
    limited = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *command, "train", config]
    subprocess.run([*limited, *where], check=True)
