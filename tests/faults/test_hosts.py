"""Processes that die, fail or fall silent; signals; folders that can no longer be
written: none waits for ever."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import read_only

from gamayun_jax.storage import as_path, remove_tree
from gamayun_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow


def start(experiment, run, words=(), devices=1, program=("-m", "gamayun_jax")):
    env = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices))
    command = [sys.executable, *program, "train", str(experiment)]
    return subprocess.Popen(
        [*command, "--workdir", str(run), *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start_all(experiment, run, count, *more, programs=None, last=()):
    """`last`: further words of the last process alone."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    words = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    words += ["--silence", "8", *more, "--process-id"]
    programs = programs or [("-m", "gamayun_jax")] * count
    return [
        start(
            experiment,
            run,
            [*words, str(i), *(last if i == count - 1 else ())],
            program=programs[i],
        )
        for i in range(count)
    ]


def wait_for_step(run, step, process=None):
    for _ in range(1200):
        assert process is None or process.poll() is None, process.communicate()[0]
        if (run / "checkpoints" / str(step)).is_dir():
            return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint at step {step}")


def finish(processes):
    return [(p.communicate(timeout=300)[0], p.returncode) for p in processes]


def test_a_process_that_dies_stops_the_others(experiment, tmp_path):
    run = tmp_path / "run"
    processes = start_all(experiment, run, 4, "--set", "stages.enrich.tokens=2000000")
    wait_for_step(run, 3)
    processes[2].kill()
    begin = time.monotonic()
    ends = finish(processes)
    assert time.monotonic() - begin < 90
    assert [status for _, status in ends if status != -signal.SIGKILL] == [4, 4, 4]
    for out, status in ends:
        if status == 4:
            assert re.search(r"process 2 .*start them again", out), out[-2000:]


def test_the_first_process_dies(experiment, tmp_path):
    run = tmp_path / "run"
    processes = start_all(experiment, run, 2, "--set", "stages.enrich.tokens=2000000")
    wait_for_step(run, 3)
    processes[0].kill()
    begin = time.monotonic()
    (_, _), (out, status) = finish(processes)
    assert time.monotonic() - begin < 90
    assert status in (4, -signal.SIGABRT), out[-2000:]


def test_an_error_on_one_process_alone(experiment, tmp_path):
    """The first one finds the run folder in use; the second would wait for it."""
    from gamayun_jax.training.run_folder import RunFolder

    held = RunFolder(tmp_path / "run")
    begin = time.monotonic()
    (out, status), (other, other_status) = finish(
        start_all(experiment, tmp_path / "run", 2)
    )
    held.close()
    assert time.monotonic() - begin < 110
    assert status == 2
    assert "in use by another process" in out
    assert other_status in (4, -signal.SIGABRT)
    assert "process 0 failed" in other or other_status != 4


GONE = """
import os, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from gamayun_jax.training import cluster
with cluster.exit_with_peers(silence=4.0, pause=0.5):
    cluster.gather(1)
    if sys.argv[2] == "1":
        os._exit(9)
    cluster.gather(2)
"""


def start_programs(program):
    """Two processes of a program, given the first one's address and their number."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, f"localhost:{port}", str(i)],
            env=dict(os.environ, JAX_NUM_CPU_DEVICES="1"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


def test_a_collective_broken_on_the_fast_path_of_a_function():
    """JAX raises it as ValueError, like bad input."""
    (out, status), _ = finish(start_programs(GONE))
    assert status == 4, out[-2000:]
    assert "start them again" in out


def test_an_interrupted_process_does_not_wait_for_the_others():
    """It did, and was aborted by JAX once they had ended."""
    program = GONE.replace("os._exit(9)", "raise KeyboardInterrupt")
    (out, status), (other, interrupted) = finish(start_programs(program))
    assert (status, interrupted) == (4, 130), out[-2000:] + other[-2000:]
    assert "process 1 was interrupted" in out


CANNOT_READ = """
import sys
import orbax.checkpoint as ocp
from gamayun_jax import cli
from gamayun_jax.training import checkpoint
{}
sys.exit(cli.main())
"""
READS_NOTHING = """
restore = ocp.PyTreeCheckpointHandler.restore
def failing(self, directory, args):
    if str(directory).endswith("13/params"):
        raise OSError(5, "Input/output error")
    return restore(self, directory, args=args)
ocp.PyTreeCheckpointHandler.restore = failing
"""
READS_OTHER = """
import jax
restore = ocp.PyTreeCheckpointHandler.restore
def changing(self, directory, args):
    found = restore(self, directory, args=args)
    if str(directory).endswith("13/params"):
        norm = found["final_norm"]["scale"]  # every process has all of it
        parts = [2 * s.data for s in norm.addressable_shards]
        found["final_norm"]["scale"] = (
            jax.make_array_from_single_device_arrays(norm.shape, norm.sharding, parts))
    return found
ocp.PyTreeCheckpointHandler.restore = changing
"""


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    ((out, status),) = finish([start(experiment, run, devices=2)])
    assert status == 0, out[-2000:]
    return run


@pytest.mark.parametrize("fault", [READS_NOTHING, READS_OTHER])
def test_a_checkpoint_that_one_process_cannot_read(
    experiment, trained, tmp_path, fault
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    programs = [("-m", "gamayun_jax"), ("-c", CANNOT_READ.format(fault))]
    ends = finish(start_all(experiment, run, 2, programs=programs))
    for out, status in ends:
        assert status == 0, out[-2000:]
    told = ends[0][0]
    assert "checkpoint 13 is damaged (processes [1] cannot read it)" in told
    assert "going on from step 12" in told
    assert (run / "damaged" / "13").is_dir()
    assert (run / "checkpoints" / "13").is_dir()


SLOW_READER = """
import sys, time
from gamayun_jax import cli
from gamayun_jax.data import loader
read = loader.LocalBatches.__getitem__
def slowly(self, step):
    time.sleep(1)
    return read(self, step)
loader.LocalBatches.__getitem__ = slowly
sys.exit(cli.main())
"""


def test_a_straggler_shows_in_the_metrics(experiment, tmp_path):
    """One process reads slowly: it has the longest input, the other waits for it."""
    run = tmp_path / "run"
    programs = [("-m", "gamayun_jax"), ("-c", SLOW_READER)]
    words = ["--set", "data.threads=1", "--set", "data.prefetch=1"]
    for out, status in finish(start_all(experiment, run, 2, *words, programs=programs)):
        assert status == 0, out[-2000:]
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [r["hosts"] for r in lines if r["kind"] == "train"]
    for name, process in (("input_s", 1), ("wait_s", 0)):
        # Without the compilation; a short interval may be served from what was read.
        told = [h[name] for h in found[1:]]
        most = sum(h["max"] for h in told)
        assert sum(h["max"] for h in told if h["process"] == process) > 0.7 * most, told


COUNTS_COMPILATIONS = """
import os, sys
del os.environ["JAX_COMPILATION_CACHE_DIR"]  # the tests': the run keeps its own
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
from gamayun_jax import cli, train
compile_step = train.compile_step
def counting(*args):
    step = compile_step(*args)
    counts = [events.count("/jax/compilation_cache/" + name)
              for name in ("compile_requests_use_cache", "cache_hits")]
    print("programs asked for and found:", *counts, flush=True)
    return step
train.compile_step = counting
sys.exit(cli.main())
"""


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_restart_compiles_nothing(experiment, tmp_path, place, request):
    """On no process before its first step; and what the first one compiled gives the
    others what they computed with their own."""
    run = tmp_path / "run"
    if place == "bucket":
        run = as_path(request.getfixturevalue("bucket"))
    programs = [("-c", COUNTS_COMPILATIONS)] * 2

    def train():
        ends = finish(start_all(experiment, run, 2, programs=programs))
        for out, status in ends:
            assert status == 0, out[-2000:]
        folder = run / "checkpoints"
        with contextlib.closing(Checkpoints(folder, read_only=True)) as store:
            sums = store.meta(13).checksums
        return sums, [re.findall(r" found: (\d+) (\d+)", out) for out, _ in ends]

    sums, cold = train()
    assert cold[0][0][1] == "0"
    for step in (9, 12, 13):
        remove_tree(run / "checkpoints" / str(step))
    again, warm = train()
    assert again == sums
    for ((asked, found),) in warm:
        assert asked == found != "0", warm


def test_a_second_signal_exits_at_once(experiment, tmp_path):
    run = tmp_path / "run"
    process = start(experiment, run, ["--set", "stages.enrich.tokens=2000000"], 2)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGSTOP)  # both arrive before the step ends
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    process.send_signal(signal.SIGCONT)
    out = process.communicate(timeout=60)[0]
    assert time.monotonic() - begin < 30
    assert process.returncode in (130, 3), out[-2000:]
    assert max(int(p.name) for p in Path(run / "checkpoints").iterdir()
               if p.name.isdigit()) >= 3  # fmt: skip


def test_a_folder_that_becomes_read_only_ends_the_process(experiment, tmp_path):
    """Also where threads of Orbax wait ten minutes for the save that failed."""
    run = tmp_path / "run"
    words = ["--set", f"stages.enrich.tokens={36 * 8 * 64}"]
    words += ["--set", "checkpoint.every_steps=1"]
    process = start(experiment, run, words, 2)
    wait_for_step(run, 3, process)
    try:
        with read_only(run / "checkpoints"):
            out = process.communicate(timeout=100)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 2, out[-2000:]
    assert re.search(r"gamayun: .*Read-only file system.*from step \d", out), out
    ((out, status),) = finish([start(experiment, run, words, 2)])
    assert status == 0, out[-2000:]
    assert "going on from step" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "seed=5"], "seed is 0 there and 5 here"),
        (["--fresh"], "--fresh is False there and True here"),
    ],
)
def test_processes_that_are_started_differently(experiment, tmp_path, words, told):
    """Another seed would train on other examples, without a word."""
    ends = finish(start_all(experiment, tmp_path / "run", 2, last=words))
    assert [status for _, status in ends] == [4, 2]
    for out, _ in ends:
        assert told in out, out[-2000:]


def test_processes_with_other_run_folders(experiment, tmp_path):
    """They would wait for each other at the first checkpoint."""
    words = ["--workdir", str(tmp_path / "other")]
    ends = finish(start_all(experiment, tmp_path / "run", 2, last=words))
    assert [status for _, status in ends] == [2, 2]
    for out, _ in ends:
        assert "processes [1] do not see what the first one writes" in out
    assert not (tmp_path / "other" / "checkpoints").exists()
