"""Everything that is measured on one NVIDIA GPU, in one command.

    python benchmarks/gpu.py --out gpu.jsonl        (about 4 minutes on an H100)
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --toy --out toy.jsonl  (the same code on a CPU, tiny sizes)

Each part is a process of its own with a time limit: what fails, or does not fit in
memory, loses nothing of the others. A part takes its cases in the order of their
importance and begins none that would pass its limit. Results are appended to the file
as they come, one JSON object a line; the tables at the end are made of it alone
(`--table FILE` makes them again). Parts of PyTorch need torch and transformers, all
others only jax, flax, optax and orbax-checkpoint.

MFU is tokens/s times `flops_per_token` (model/weights.py: 6 for each parameter in a
matrix product, and half of the T x T scores, whatever the documents in a row) over the
data sheet's dense bfloat16 peak; the measured peak of a large product is beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Part(NamedTuple):
    where: str  # module of the function
    seconds: float  # of its own, beyond which it begins no case
    about: str


PARTS = {
    "peaks": Part("gpu_jax", 25, "copy bandwidth and a bfloat16 product of 8192^3"),
    "step": Part(
        "gpu_jax", 110, "the 1.5B training step: remat, microbatches, kernels"
    ),
    "step_torch": Part("gpu_torch", 75, "the same model and batch in PyTorch"),
    "attention": Part("gpu_jax", 50, "attention over packed documents, all kernels"),
    "attention_torch": Part("gpu_torch", 45, "the same in PyTorch"),
    "seeds": Part("gpu_jax", 50, "seeds side by side against one after another"),
    "decode": Part("gpu_jax", 60, "new tokens/s of the 1.5B model at batch 1, 16, 64"),
    "decode_torch": Part("gpu_torch", 40, "the same by transformers' generate"),
}
GRACE = 30  # seconds that a part's last case may take beyond its limit


class Recorder:
    """Rows of one part, and the time that it has left.

    Args:
      out: file to append to.
      seconds: of the part.
      sync: waits for the device.
    """

    def __init__(self, part: str, out: Path, seconds: float, toy: bool):
        self.part, self.out, self.toy = part, out, toy
        self.begin = time.monotonic()
        self.seconds, self.longest = seconds, 0.0

    def write(self, case: str, **values: Any) -> None:
        row = {"part": self.part, "case": case, "toy": self.toy, **values}
        row["at"] = round(time.monotonic() - self.begin, 1)
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(_brief(row), flush=True)

    def case(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a case if there is time for one as long as the longest so far."""
        begin = time.monotonic()
        if begin - self.begin + 0.7 * self.longest > self.seconds:
            self.write(name, left_out="no time left")
            return
        try:
            self.write(name, **measure())
        except Exception as e:  # out of memory, no such kernel: the others go on
            self.write(name, error=f"{type(e).__name__}: {e}"[:600])
        gc.collect()
        self.longest = max(self.longest, time.monotonic() - begin)

    def time(
        self, run: Callable[[], Any], sync: Callable[[Any], Any], rounds: int, calls=1
    ) -> list[float]:
        """Seconds of a call in each round of so many calls; the first is a warm-up."""
        times = []
        for _ in range(1 + (2 if self.toy else rounds)):
            begin = time.perf_counter()
            for _ in range(calls):
                out = run()
            sync(out)
            times.append((time.perf_counter() - begin) / calls)
        return times[1:]


class Worker:
    """A process that imports a part's modules, and measures when told to go."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        self.limit = PARTS[name].seconds * args.scale * (10 if args.toy else 1)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, __file__, "--worker", name, "--out", str(args.out)]
        command += ["--seconds", str(self.limit), *(["--toy"] if args.toy else [])]
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".93", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(HERE.parent), environment.get("PYTHONPATH")])
        )
        if args.toy or PARTS[name].where == "gpu_torch":
            environment["JAX_PLATFORMS"] = "cpu"  # on the GPU it would take all memory
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=self.errors,
            start_new_session=True, text=True,
        )  # fmt: skip

    def stop(self) -> None:
        """End the process and its children, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def run(self) -> None:
        """Have it measure, and stop it past its limit."""
        begin, note = time.monotonic(), ""
        print(f"--- {self.name}: {PARTS[self.name].about}", flush=True)
        try:
            self.process.communicate("go\n", self.limit + GRACE)
        except subprocess.TimeoutExpired:
            note = "stopped at its time limit; "
        finally:
            self.stop()
        self.errors.seek(0)
        log, toy = self.errors.read(), self.args.toy
        row: dict[str, Any] = {"part": self.name, "case": "whole", "toy": toy}
        row["wall"] = round(time.monotonic() - begin, 1)
        if status := self.process.returncode:
            row["error"] = f"{note}status {status}: {log[-1500:]}"
            print(row["error"], flush=True)
        with self.args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.args.log:
            with self.args.log.open("a") as file:
                file.write(f"--- {self.name}\n{log[-100_000:]}\n")


# --- tables -----------------------------------------------------------------------


def _spread(times: list[float], scale: float) -> str:
    """Median of `scale / time` (lowest-highest)."""
    rates = sorted(scale / t for t in times)
    digits = 0 if rates[0] >= 100 else 2
    middle = f"{statistics.median(rates):.{digits}f}"
    return f"{middle} ({rates[0]:.{digits}f}-{rates[-1]:.{digits}f})"


def _milliseconds(times: list[float]) -> str:
    ms = sorted(1e3 * t for t in times)
    return f"{statistics.median(ms):.3f} ms ({ms[0]:.3f}-{ms[-1]:.3f})"


def _brief(row: dict[str, Any], peaks: dict[str, float] | None = None) -> str:
    """One line of a table."""
    peaks = peaks or {}
    head = f"{row['case']:<34}"
    for key in ("error", "left_out"):
        if key in row:
            return f"{head} {key.replace('_', ' ')}: {row[key]}"[:400]
    words = []
    if "tokens" in row:
        words.append(f"{_spread(row['times'], row['tokens'])} tokens/s")
        median = row["tokens"] / statistics.median(row["times"])
        if row.get("flops_per_token"):
            reached = median * row["flops_per_token"]
            if row.get("peak_flops"):
                words.append(f"MFU {reached / row['peak_flops']:.1%}")
            if "matmul" in peaks:
                words.append(f"{reached / peaks['matmul']:.1%} of measured")
        if "bytes" in row and "copy" in peaks:
            floor = row["bytes"] / peaks["copy"] * row["steps"]
            words.append(f"floor {floor / statistics.median(row['times']):.1%}")
    elif "times" in row:
        words.append(_milliseconds(row["times"]))
    if "forward" in row:
        words.append(f"forward {_milliseconds(row['forward'])}")
    if "rate" in row:
        words.append(f"{_spread(row['times'], row['rate'])} {row['unit']}")
    for key in ("peak_gib", "compile_s", "wall"):
        if row.get(key) is not None:
            words.append(f"{key} {row[key]}")
    if "errors" in row:
        found = (f"{k} {v:.1e}" for k, v in row["errors"].items())
        words.append("error " + " ".join(found))
    for key in ("device", "versions", "note"):
        if key in row:
            words.append(str(row[key]))
    return head + " " + "; ".join(words)


def table(path: Path) -> str:
    """All rows of a results file by part; the last of a case counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = {(r["part"], r["case"]): r for r in rows}
    peaks = {}
    for (part, case), row in last.items():
        if part == "peaks" and "rate" in row:
            peaks[case] = 1e12 * row["rate"] / statistics.median(row["times"])
    lines = []
    for name in PARTS:
        found = [r for (part, _), r in last.items() if part == name]
        if found:
            lines += [f"== {name}: {PARTS[name].about}"]
            lines += [_brief(row, peaks) for row in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--parts", default=",".join(PARTS), help="a,b; default: all")
    parser.add_argument("--list", action="store_true", help="the parts")
    parser.add_argument("--table", type=Path, help="of a former run; measures nothing")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of all parts' time limits"
    )
    parser.add_argument(
        "--budget", type=float, default=1e9, help="seconds after which no part begins"
    )
    parser.add_argument("--log", type=Path, help="to append what parts print to")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:<16} {part.seconds:>4.0f} s  {part.about}")
        return
    if args.table:
        print(table(args.table))
        return
    if args.worker:
        from gamayun_jax.training import xla

        xla.set_flags()  # as a run does, before JAX looks for devices
        module = importlib.import_module(PARTS[args.worker].where)
        if not sys.stdin.readline():
            return
        recorder = Recorder(args.worker, args.out, args.seconds, args.toy)
        getattr(module, args.worker)(recorder)
        return
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: no part {sorted(unknown)}; --list names them")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    # The next part imports its modules while this one measures.
    following: Worker | None = Worker(names[0], args)
    try:
        for i, name in enumerate(names):
            if time.monotonic() - begin > args.budget:
                print(f"--- {name}: left out, --budget is spent", flush=True)
                continue
            worker = following
            following = Worker(names[i + 1], args) if names[i + 1 :] else None
            assert worker is not None
            worker.run()
    finally:
        if following:
            following.stop()
    print(f"\n{table(args.out)}\nall: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
