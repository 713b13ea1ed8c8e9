"""A folder in a bucket has one writer at a time."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from gamayun_jax import lease as leases
from gamayun_jax.lease import Lease, LostError
from gamayun_jax.storage import InUseError, as_path

HELD = "run folder x"


@pytest.fixture
def path(bucket):
    return as_path(bucket) / ".lock"


def owner(path):
    return json.loads(path.read_text())


def held_by(path, **words):
    """A lease of somebody else's, on another machine."""
    there = dict(host="far", boot="b", space="s", pid=7, started="1", id="z", count=1)
    path.write_text(json.dumps({**there, "lease_s": 1.0, **words}))


def test_one_at_a_time(path):
    with contextlib.closing(Lease(path, HELD)):
        assert owner(path)["pid"] == os.getpid()
        with pytest.raises(InUseError, match=r"run folder x is in use by .*lease ends"):
            Lease(path, HELD)
    assert not path.exists()
    Lease(path, HELD).close()


def test_of_many_at_once_one_gets_it(path):
    """They ask at the same moment, of a lease that is nobody's."""
    held, refused, barrier = [], [], threading.Barrier(6)

    def ask():
        barrier.wait()
        try:
            held.append(Lease(path, HELD))
        except InUseError as e:
            refused.append(e)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)
    held[0].close()


def test_an_owner_of_this_machine_that_is_gone_keeps_nobody_waiting(path, bucket):
    code = f"""
import os
from gamayun_jax.lease import Lease
from gamayun_jax.storage import InUseError, as_path
Lease(as_path({bucket!r}) / ".lock", "x")
os.kill(os.getpid(), 9)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert owner(path)["host"]
    begin = time.monotonic()
    Lease(path, HELD).close()
    assert time.monotonic() - begin < 5


def test_an_owner_elsewhere_is_waited_for(path):
    """Dead once its object stayed the same for a whole lease, by our own clock."""
    held_by(path, started="0")
    said, begin = [], time.monotonic()
    Lease(path, HELD, said.append, seconds=1.0).close()
    assert 1.0 <= time.monotonic() - begin < 3
    assert "was last written by far (process 7)" in said[0]
    assert len(said) == 1
    # Its lease is the longer one.
    held_by(path, lease_s=2.0)
    begin = time.monotonic()
    Lease(path, HELD, seconds=0.5).close()
    assert time.monotonic() - begin >= 2.0


def test_an_owner_elsewhere_that_lives_is_not_robbed(path):
    held_by(path)
    renewal = threading.Timer(0.5, lambda: held_by(path, count=2))
    renewal.start()
    with pytest.raises(InUseError, match=r"in use by far \(process 7\)"):
        Lease(path, HELD, seconds=2.0)
    renewal.join()
    assert owner(path)["id"] == "z"


def test_a_lease_is_renewed(path):
    with contextlib.closing(Lease(path, HELD, seconds=3.0)) as lease:
        end = time.monotonic() + 60
        while owner(path)["count"] < 4 and time.monotonic() < end:
            time.sleep(0.1)
        lease.check()  # after more than its three seconds
        assert owner(path)["count"] >= 4


def test_what_is_taken_over_is_lost(path):
    lost = []
    lease = Lease(path, HELD, lost=lost.append, seconds=0.9)
    held_by(path)
    time.sleep(1.0)
    with pytest.raises(LostError, match=r"far \(process 7\) took it over.*nothing"):
        lease.check()
    assert len(lost) == 1
    lease.close()
    assert owner(path)["id"] == "z"  # not ours to take away


def test_an_owner_that_cannot_renew_stops_before_its_lease_ends(path, bucket_server):
    lost = []
    begin = leases.now()
    lease = Lease(path, HELD, lost=lambda e: lost.append(leases.now()), seconds=4.0)
    bucket_server.fault = lambda kind, name: 503 if ".lock" in name else None
    while not lost:
        lease.check() if leases.now() < begin + 2 else None
        time.sleep(0.01)
        assert leases.now() < begin + 9
    assert lost[0] - begin < 4.0
    with pytest.raises(LostError, match="could not be renewed in time"):
        lease.check()
    lease.close()


def test_short_troubles_are_outlived(path, bucket_server):
    lease = Lease(path, HELD, seconds=2.0)
    before, fault = owner(path)["count"], iter([503, 429, 500])
    bucket_server.fault = lambda *_: next(fault, None)
    time.sleep(2.5)
    lease.check()
    assert owner(path)["count"] > before
    lease.close()


def test_a_renewal_whose_answer_was_lost_is_ours(path, bucket_server):
    """The server wrote it, and the client heard nothing."""
    lease = Lease(path, HELD, seconds=2.0)
    cut = iter(["cut"])
    bucket_server.fault = lambda kind, _: next(cut, None) if kind == "write" else None
    time.sleep(2.5)
    lease.check()
    lease.close()
    assert not path.exists()
