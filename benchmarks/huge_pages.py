"""What memory in huge pages is worth on a CPU: faults, seconds, resident memory.

    python benchmarks/huge_pages.py [--rounds 5] [--builds 3]

The train step of train_step.py, all rows at once, two processes that take turns,
without and with GLIBC_TUNABLES=glibc.malloc.hugetlb=1; then builds of the demo's corpus
by two workers, without and with, in turns. Ratios are of the same round.

Figures: see docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import ratio, row

HERE = Path(__file__).parent
TINY = HERE.parent / "experiments" / "tiny.py"
TUNABLE = "glibc.malloc.hugetlb"
WAYS = {"without": "0", "with": "1"}
UNITS = {"faults": "page faults", "cpu": "s of a processor", "wall": "s", "peak": "MiB"}


def environment(way: str) -> dict[str, str]:
    return {**os.environ, "GLIBC_TUNABLES": f"{TUNABLE}={WAYS[way]}"}


def steps(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Of a step, by round; both ways in turns."""
    command = [sys.executable, str(HERE / "train_step.py")]
    command += ["--worker", "gamayun_jax whole"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    running = {w: subprocess.Popen(command, env=environment(w), **pipes) for w in WAYS}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for process in running.values():
        process.stdout.readline()
    for _ in range(rounds):
        for way, process in running.items():
            process.stdin.write("\n")
            process.stdin.flush()
            found[way].append(json.loads(process.stdout.readline())["step"])
    for process in running.values():
        process.communicate()
    return found


def builds(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Of a build with two workers, by round."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "gamayun_jax", "corpus", "build"]
                command += [str(TINY), "--out", folder, "--workers", "2"]
                begin = time.perf_counter()
                pid = os.posix_spawn(
                    sys.executable,
                    command,
                    environment(way),
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0)
                        for fd in (1, 2)
                    ],
                )
                _, status, used = os.wait4(pid, 0)
                assert status == 0
            found[way].append(
                {
                    "faults": used.ru_minflt,
                    "cpu": used.ru_utime + used.ru_stime,
                    "wall": time.perf_counter() - begin,
                    "peak": used.ru_maxrss / 1024,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--builds", type=int, default=3)
    args = parser.parse_args()
    for what, found in (
        ("a train step", steps(args.rounds)),
        ("a corpus build", builds(args.builds)),
    ):
        values = {
            way: {k: [r[k] for r in rounds] for k in UNITS}
            for way, rounds in found.items()
        }
        for key, unit in UNITS.items():
            for way in WAYS:
                row(f"{what}, {way} huge pages", unit, values[way][key])
            if key in ("cpu", "wall"):
                name = f"{what}, {unit}, with over without"
                ratio(name, values["with"][key], values["without"][key])


if __name__ == "__main__":
    main()
