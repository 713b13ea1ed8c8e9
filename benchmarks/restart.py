"""Time from the start of `gamayun train` that goes on from a checkpoint to a step.

    python benchmarks/restart.py CORPUS [--processes 4] [--rounds 3] [--latency 0.02]

With the programs that the run folder keeps, and without, in turns
(JAX_ENABLE_COMPILATION_CACHE=0); with --latency also a run folder in a bucket of a
server on this machine that waits so long before each answer. Seconds are wall time,
and the processor's of all processes. CORPUS is that of experiments/tiny.py:
gamayun corpus build experiments/tiny.py --out CORPUS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import rows

from gamayun_jax.storage import as_path, is_bucket, remove_tree, upload


def processor_seconds(pid: int) -> float:
    """User and system seconds of a process that is not waited for yet."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def command(corpus: Path, run: Path) -> list[str]:
    """`gamayun train` of the demo's model, with a checkpoint at step 20."""
    sets = {
        "data.corpus": corpus,
        "checkpoint.every_steps": 20,
        "log.every_steps": 1,
        "evaluation.every_steps": 1_000_000,
    }
    words = [sys.executable, "-m", "gamayun_jax", "train", "experiments/tiny.py"]
    words += ["--workdir", str(run)]
    return words + [w for k, v in sets.items() for w in ("--set", f"{k}={v}")]


def first_step(corpus: Path, run: Path, processes: int, env) -> tuple[float, float]:
    """Start, wait for the first step, kill: wall and processor seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command(corpus, run)
    start = time.perf_counter()
    started = []
    for number in range(processes):
        join = ["--coordinator", f"localhost:{port}", "--num-processes"]
        join += [str(processes), "--process-id", str(number)]
        out = subprocess.PIPE if number == 0 else subprocess.DEVNULL
        started.append(
            subprocess.Popen(
                words + join * (processes > 1),
                stdout=out,
                stderr=out,
                env=env,
                text=True,
            )
        )
    with contextlib.suppress(StopIteration):
        next(line for line in started[0].stdout if "loss" in line)
    wall = time.perf_counter() - start
    spent = sum(processor_seconds(process.pid) for process in started)
    for process in started:
        process.kill()
        process.wait()
    return wall, spent


@contextlib.contextmanager
def bucket(folder: Path, latency: float) -> Iterator[Path]:
    """A run folder in a bucket, for all that is started here."""
    program = Path(__file__).parents[1] / "tests/bucket_server.py"
    words = [sys.executable, str(program), str(folder), str(latency)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        os.environ.update(json.loads(server.stdout.readline()))
        yield as_path("gs://runs/run")
        server.stdin.close()


def begin_again(base: Path, run: Path) -> None:
    """Make `run` what `base` is, but for the programs that it keeps."""
    if is_bucket(run):
        for path in run.rglob("*"):
            if "compiled" not in path.parts:
                path.unlink()
        upload(base, run)
        return
    for item in run.glob("*"):
        if item.name != "compiled":
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    shutil.copytree(base, run, dirs_exist_ok=True)


def train_base(corpus: Path, base: Path) -> None:
    """A run that was stopped after a checkpoint, without programs."""
    train = subprocess.Popen(command(corpus, base))
    while train.poll() is None and not list(base.glob("checkpoints/20/_CHECK*")):
        time.sleep(0.5)
    train.terminate()
    train.wait()
    remove_tree(base / "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, help="seconds; with a bucket, too")
    args = parser.parse_args()
    corpus = args.corpus.absolute()
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = {"folder": folder / "run"}
        train_base(corpus, folder / "base")
        if args.latency is not None:
            (folder / "bucket").mkdir()
            places["bucket"] = stack.enter_context(
                bucket(folder / "bucket", args.latency)
            )
        spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for number in range(args.rounds + 1):  # the first one fills the cache
            for place, run in places.items():
                for cache in ("kept", "anew"):
                    begin_again(folder / "base", run)
                    used = str(int(cache == "kept"))
                    env = dict(os.environ, JAX_ENABLE_COMPILATION_CACHE=used)
                    took = first_step(corpus, run, args.processes, env)
                    if number:
                        spent.setdefault((place, cache), []).append(took)
        for what, k in (("wall", 0), ("processor", 1)):
            of = {turn: [took[k] for took in spent[turn]] for turn in spent}
            for place in places:
                kept, anew = of[place, "kept"], of[place, "anew"]
                rows.row(f"{place}, {what}, programs kept", "s", kept)
                rows.row(f"{place}, {what}, compiled anew", "s", anew)
                rows.ratio(f"{place}, {what}: kept over anew", kept, anew)
            if "bucket" in places:
                there, here = of["bucket", "kept"], of["folder", "kept"]
                rows.ratio(f"{what}, kept: bucket over folder", there, here)


if __name__ == "__main__":
    main()
