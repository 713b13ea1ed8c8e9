"""Flat shards: each record is read where it must be, and damage is found and named."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from small_corpora import write_shard

from gamayun_jax.config import UserError
from gamayun_jax.data import records
from gamayun_jax.data.records import BadRecordError, FlatShard, Records, check_shard

LENGTH, VOCAB = 9, 300
SIZE = 2 * LENGTH


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(0, VOCAB, (20, LENGTH)).astype("<u2")


@pytest.fixture
def shard(tmp_path, rows):
    write_shard(tmp_path / "a.records", rows)
    return tmp_path / "a.records"


def opened(path, count, shard_format=2):
    return Records([(str(path), count)], "uint16", VOCAB, LENGTH, shard_format)


def test_both_formats_give_the_same_records(tmp_path, rows, shard):
    writer = ArrayRecordWriter(str(tmp_path / "former"), "group_size:1,uncompressed")
    for row in rows:
        writer.write(row.tobytes())
    writer.close()
    for path, shard_format in ((shard, 2), (tmp_path / "former", 1)):
        check_shard(path, len(rows), SIZE, shard_format)
        found = pickle.loads(pickle.dumps(opened(path, len(rows), shard_format)))
        assert found[3].dtype == np.int32
        np.testing.assert_array_equal(np.stack(list(found)), rows)


def test_every_changed_bit_is_found(rows, shard):
    whole = shard.read_bytes()
    stride = len(whole) // len(rows)
    for bit in range(8 * stride):
        data = bytearray(whole)
        data[5 * stride + bit // 8] ^= 1 << bit % 8
        shard.write_bytes(data)
        found = opened(shard, len(rows))
        with pytest.raises(BadRecordError, match=rf"{shard}, record 5: its bytes"):
            found[5]
        np.testing.assert_array_equal(found[4], rows[4])
        np.testing.assert_array_equal(found[6], rows[6])


def test_a_record_in_anothers_place_is_found(rows, shard):
    data = bytearray(shard.read_bytes())
    stride = len(data) // len(rows)
    data[:stride] = data[stride : 2 * stride]
    shard.write_bytes(data)
    with pytest.raises(BadRecordError, match="record 0: its bytes"):
        opened(shard, len(rows))[0]


@pytest.mark.parametrize("cut", [1, SIZE, SIZE + records.CHECKSUM, 100])
def test_a_cut_shard_is_found_at_once_and_by_its_records(rows, shard, cut):
    os.truncate(shard, shard.stat().st_size - cut)
    with pytest.raises(UserError, match=r"has \d+ records, 20|is damaged \(its last"):
        check_shard(shard, len(rows), SIZE, 2)
    found = opened(shard, len(rows))
    with pytest.raises(BadRecordError, match=r"record 19: \d+ of its 22 bytes"):
        found[19]
    np.testing.assert_array_equal(found[0], rows[0])


def test_size_costs_nothing(tmp_path, rows):
    """A shard of a terabyte: opened, counted, and read at its end."""
    path, number = tmp_path / "large", 2**40 // (SIZE + records.CHECKSUM)
    with open(path, "wb") as f:
        f.seek(number * (SIZE + records.CHECKSUM))
        f.write(records.with_checksum(rows[0].tobytes(), number))
    check_shard(path, number + 1, SIZE, 2)
    np.testing.assert_array_equal(opened(path, number + 1)[number], rows[0])


def test_threads_share_a_shard(rows, shard):
    found = opened(shard, len(rows))
    order = np.random.default_rng(1).integers(0, len(rows), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = np.stack(list(pool.map(found.__getitem__, order)))
    np.testing.assert_array_equal(read, rows[order])


def test_a_shard_is_closed_when_let_go_of(shard):
    def files():
        return len(os.listdir("/proc/self/fd"))

    before = files()
    reader = FlatShard(str(shard), SIZE)
    assert files() == before + 1
    del reader
    assert files() == before


def test_a_disk_that_fills_up_stops_the_build(tmp_path):
    """Nothing that looks like a shard is left; the same build then goes on."""
    corpus = str(tmp_path / "corpus")
    words = ["tests/faults/small_run.py", "--out", corpus, "--workers", "1"]
    command = [sys.executable, "-m", "gamayun_jax", "corpus", "build", *words]
    # In blocks of 512 bytes: less than a shard has, more than a scan. A shell sets it,
    # since a preexec_fn would fork this process with JAX's threads.
    limited = ["sh", "-c", 'ulimit -f 300; exec "$@"', "sh", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert not list(tmp_path.rglob("*.records"))
    subprocess.run(command, check=True, capture_output=True)
