"""Whole processes: killed at any time, and a changing number of them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gamayun_jax.model import sharding
from gamayun_jax.training import checkpoint
from gamayun_jax.training.step import abstract_state

pytestmark = pytest.mark.slow


def start(experiment, run, devices, *words, python=sys.executable):
    env = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices))
    if python != sys.executable:
        env["XLA_FLAGS"] = ""  # of this jaxlib: another one ends where one is unknown
    command = [python, "-m", "gamayun_jax", "train", str(experiment)]
    return subprocess.Popen(
        [*command, "--workdir", str(run), *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, status=0):
    out = process.communicate(timeout=300)[0]
    assert process.returncode == status, out[-3000:]
    return out


def outcome(run, config, last=13):
    """Final state, records without their times, and evaluations."""
    store = checkpoint.Checkpoints(run / "checkpoints", read_only=True)
    state = store.restore(last, abstract_state(config, sharding.make_mesh(config.mesh)))
    store.close()
    records = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    for r in records:
        del r["time"]
        r.pop("hosts", None)
    evals = {p.name: json.loads(p.read_text()) for p in (run / "eval").glob("*.json")}
    items = {str(p): p.read_text() for p in (run / "eval").glob("*.items/*.jsonl")}
    evals |= {k.removeprefix(str(run)): v for k, v in items.items()}
    assert items
    return jax.tree.leaves(jax.device_get(state)), records, evals


def assert_same(a, b):
    for x, y in zip(a[0], b[0], strict=True):
        np.testing.assert_array_equal(x, y)
    assert a[1:] == b[1:]


@pytest.fixture(scope="module")
def straight(experiment, config, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    finish(start(experiment, run, 2))
    return outcome(run, config)


def test_killed_at_random_moments(experiment, config, straight, tmp_path):
    """SIGKILL during start, compilation, steps, saves, evaluations, the transition."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    run = tmp_path / "run"
    for _ in range(6):
        process = start(experiment, run, 2)
        time.sleep(rng.uniform(3.0, 16.0))
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    finish(start(experiment, run, 2))
    assert_same(outcome(run, config), straight)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start_group(experiment, run, count=2, devices=1, words=()):
    """`count` processes with `devices` each."""
    port = f"localhost:{free_port()}"
    words = (*words, "--coordinator", port, "--num-processes", str(count))
    words = (*words, "--process-id")
    return [start(experiment, run, devices, *words, str(i)) for i in range(count)]


def wait_for_step(run, step):
    for _ in range(2400):
        there = (run / "checkpoints").glob("[0-9]*")
        if any(int(p.name) >= step for p in there if p.name.isdigit()):
            return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint at step {step}")


def test_one_process_then_two_then_one(experiment, config, straight, tmp_path):
    """Always two devices in all, so that sums are of the same two numbers."""
    run = tmp_path / "run"
    process = start(experiment, run, 2)
    wait_for_step(run, 3)
    process.send_signal(signal.SIGTERM)
    finish(process, 3)
    pair = start_group(experiment, run)
    wait_for_step(run, 9)
    for p in pair:
        p.kill()
    for p in pair:
        p.communicate()
    finish(start(experiment, run, 2))
    assert_same(outcome(run, config), straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both(
    experiment, config, straight, tmp_path, number
):
    run = tmp_path / "run"
    pair = start_group(experiment, run)
    wait_for_step(run, 3)
    pair[1].send_signal(number)
    for p in pair:
        finish(p, 3)
    for p in start_group(experiment, run):
        finish(p)
    assert_same(outcome(run, config), straight)


def test_two_processes_from_start_to_end(experiment, config, straight, tmp_path):
    run = Path(tmp_path) / "run"
    for p in start_group(experiment, run):
        finish(p)
    assert_same(outcome(run, config), straight)


def test_every_kind_of_task_on_two_processes(experiment, tmp_path):
    """Held-out sets and tasks give what one process gives; the next run begins from
    this one's checkpoint."""
    # Perplexity, multiple choice, cloze, generation.
    words = [f"evaluation.tasks={json.dumps(TASKS)}", "evaluation.task_items=2"]
    words = [w for word in words for w in ("--set", word)]
    alone, run = tmp_path / "alone", tmp_path / "run"
    finish(start(experiment, alone, 2, *words))
    for p in start_group(experiment, run, words=words):
        finish(p)
    found = [read_evaluations(r) for r in (alone, run)]
    assert set(found[0]["0.json"]["tasks"]) == set(TASKS)
    assert_close(*found)
    words = [*words, "--init-from", str(run)]
    for p in start_group(experiment, tmp_path / "next", words=words):
        finish(p)
    assert (tmp_path / "next" / "checkpoints" / "13").is_dir()


TASKS = ("udhr", "cldr_facts", "last_word", "cldr_calendar")


def read_evaluations(run):
    """File -> its JSON, or the objects of its lines."""
    folder, found = run / "eval", {}
    for path in sorted(folder.rglob("*.json*")):
        text = path.read_text()
        lines = text.split("\n")[:-1] if path.suffix == ".jsonl" else [text]
        values = [json.loads(line) for line in lines]
        name = str(path.relative_to(folder))
        found[name] = values if path.suffix == ".jsonl" else values[0]
    return found


def test_four_processes_then_two_then_one(experiment, config, tmp_path):
    """Always four devices in all: trained, evaluated, saved and resumed the same, but
    for rounding, as processes add four numbers in another order than devices of one.
    """
    alone, run = tmp_path / "alone", tmp_path / "run"
    finish(start(experiment, alone, 4))
    four = start_group(experiment, run, 4)
    wait_for_step(run, 3)
    four[2].send_signal(signal.SIGTERM)
    for p in four:
        finish(p, 3)
    two = start_group(experiment, run, 2, devices=2)
    wait_for_step(run, 9)
    for p in two:
        p.kill()
    for p in two:
        p.communicate()
    finish(start(experiment, run, 4))
    for a, b in zip(outcome(run, config), outcome(alone, config), strict=True):
        assert_close(a, b)


def assert_close(a, b):
    """The same but for rounding: numbers within 1e-4 and a tenth of an update (Adam
    divides rounding by rounding where a gradient is nearly 0), all else equal."""
    if isinstance(a, str) and a[:1] == "{":  # a file of JSON
        many = "}\n{" in a
        a, b = (list(map(json.loads, x.splitlines() if many else [x])) for x in (a, b))
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float | np.ndarray):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-4)
    else:
        assert a == b


OTHER_PYTHON = os.environ.get("OTHER_PYTHON", "")
WHICH = "import jax; print(jax.__version__)"


@pytest.mark.skipif(not OTHER_PYTHON, reason="needs OTHER_PYTHON=another environment")
def test_another_jax_goes_on_and_back(experiment, config, tmp_path):
    """There and back: what differs is rounding, as compilers differ."""
    ours, other = (
        subprocess.check_output([p, "-c", WHICH], text=True).split()[0]
        for p in (sys.executable, OTHER_PYTHON)
    )
    if ours == other:
        pytest.skip(f"OTHER_PYTHON has jax {other} too")
    words = ("--set", f"stages.enrich.tokens={36 * 8 * 64}")  # 43 steps in all
    words += ("--set", "checkpoint.every_steps=1")
    alone, run = tmp_path / "alone", tmp_path / "run"
    finish(start(experiment, alone, 2, *words))
    process = start(experiment, run, 2, *words)
    wait_for_step(run, 3)
    process.send_signal(signal.SIGTERM)
    finish(process, 3)
    process = start(experiment, run, 2, *words, python=OTHER_PYTHON)
    wait_for_step(run, 20)
    process.send_signal(signal.SIGTERM)
    out = finish(process, 3)
    assert f"jax {other} goes on from a checkpoint of jax {ours}" in out
    finish(start(experiment, run, 2, *words))
    for a, b in zip(outcome(run, config, 43), outcome(alone, config, 43), strict=True):
        assert_close(a, b)
    lineage = json.loads((run / "lineage.json").read_text())
    changes = [e for e in lineage["events"] if e["event"] == "version"]
    assert [e["new"] for e in changes if e["of"] == "jax"] == [other, ours]
