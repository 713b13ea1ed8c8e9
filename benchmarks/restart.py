"""Time from the start of `gamayun train` that goes on from a checkpoint to a step.

    python benchmarks/restart.py CORPUS [--processes 4] [--rounds 3]

With the programs that the run folder keeps, and without, in turns
(JAX_ENABLE_COMPILATION_CACHE=0). Seconds are wall time, and the processor's of all
processes. CORPUS is that of experiments/tiny.py:
gamayun corpus build experiments/tiny.py --out CORPUS.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    corpus = args.corpus.absolute()
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        base, run = Path(folder) / "base", Path(folder) / "run"
        env = dict(os.environ)
        train = subprocess.Popen(command(corpus, base), env=env)
        while train.poll() is None and not list(base.glob("checkpoints/20/_CHECK*")):
            time.sleep(0.5)
        train.terminate()
        train.wait()
        spent: dict[str, list[tuple[float, float]]] = {"1": [], "0": []}
        for number in range(args.rounds + 1):  # the first one fills the cache
            for cache in spent:
                for item in run.glob("*"):
                    if item.name != "compiled":
                        shutil.rmtree(item) if item.is_dir() else item.unlink()
                keep = shutil.ignore_patterns("compiled")
                shutil.copytree(base, run, ignore=keep, dirs_exist_ok=True)
                env["JAX_ENABLE_COMPILATION_CACHE"] = cache
                took = first_step(corpus, run, args.processes, env)
                if number:
                    spent[cache].append(took)
    for what, k in (("wall", 0), ("processor", 1)):
        kept, anew = ([took[k] for took in spent[c]] for c in spent)
        rows.row(f"{what}, programs kept", "s", kept)
        rows.row(f"{what}, compiled anew", "s", anew)
        rows.ratio(f"{what}: kept over anew", kept, anew)


if __name__ == "__main__":
    main()
