"""Processes that die, fail or fall silent; signals; folders that can no longer be
written: none waits for ever."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import read_only

from gamayun_jax.config import to_dict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts") / "small.py"
    path.write_text(
        "from gamayun_jax.config import from_json\n"
        f"def get_config():\n    return from_json({json.dumps(to_dict(config))!r})\n"
    )
    return path


def start(experiment, run, words=(), devices=1, program=("-m", "gamayun_jax")):
    env = dict(os.environ, XLA_FLAGS="", JAX_NUM_CPU_DEVICES=str(devices))
    command = [sys.executable, *program, "train", str(experiment)]
    return subprocess.Popen(
        [*command, "--workdir", str(run), *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start_all(experiment, run, count, *more, programs=None):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    words = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    words += ["--silence", "8", *more, "--process-id"]
    programs = programs or [("-m", "gamayun_jax")] * count
    return [
        start(experiment, run, [*words, str(i)], program=programs[i])
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
    return [(p.communicate(timeout=120)[0], p.returncode) for p in processes]


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
    from gamayun_jax.records import RunFolder

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


SLOW_READER = """
import sys, time
from gamayun_jax import cli, data
read = data.LocalBatches.__getitem__
def slowly(self, step):
    time.sleep(1)
    return read(self, step)
data.LocalBatches.__getitem__ = slowly
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
