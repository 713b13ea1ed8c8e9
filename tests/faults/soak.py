"""Kill a run of both stages with SIGKILL a hundred times; the end must be the same.

    python tests/faults/soak.py --kills 100 [--seed 1] [--work DIR] [--bucket]

The corpus build, training and the report are each killed at random moments and at
chosen ones: while a checkpoint is written, while one is read back, at the transition,
during an evaluation, during a report's write. The end is compared with what nothing
interrupted: corpus files, parameters, optimiser, metrics, evaluations, tokens per
source. With --bucket the run folder is in a bucket of a server on this machine, and
training alone is killed; the other run stays on the disk. Prints what was injected,
how long the recoveries took and what the bucket was asked; exits 1 if anything differs.
Every life is a process of its own, forked from this one, which has imported everything
and started nothing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

CONFIG = Path(__file__).parent / "small_run.py"
STEPS, STAGE_END = 240, 130
DONE = 0


class Life:
    """`gamayun` with the given words, in a forked child; its output in a file."""

    def __init__(self, words: list[str], log: Path):
        self.log = log
        self.begin = time.monotonic()
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.setsid()  # so that its workers die with it
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            from gamayun_jax import cli

            code = cli.main(words)
            sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def kill(self) -> bool:
        """Whether there was still something to kill."""
        alive = self.running()
        if alive:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no session of its own yet
                os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return alive

    def wait(self) -> int:
        while self.running():
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def wait_for(self, happened: Callable[[], bool], limit: float = 120.0) -> bool:
        """True once it has happened, False if the process ended before."""
        end = time.monotonic() + limit
        while self.running():
            if happened():
                return True
            if time.monotonic() > end:
                raise SystemExit(f"nothing happens: {self.log.read_text()[-2000:]}")
            time.sleep(0.002)
        return False


def names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def whole(run: Path) -> set[int]:
    """Steps of the checkpoints that are there whole."""
    there = run / "checkpoints"
    marked = "runs" in run.parts  # the files of the server's bucket
    return {
        int(n)
        for n in names(there)
        if n.isdigit() and (not marked or (there / n / "commit_success.txt").exists())
    }


def aims(run: Path, life: Life, rng: random.Random):
    """name -> (what to wait for, longest random delay after it)."""
    checkpoints = run / "checkpoints"
    begin = names(checkpoints)
    before = whole(run)
    evaluations = names(run / "eval")

    def said(words: str) -> bool:
        return words in life.log.read_text(errors="replace")

    def committed(count: int) -> bool:
        return len(whole(run) - before) >= count

    def saving() -> bool:
        """A part of a checkpoint is there."""
        new = names(checkpoints) - begin
        parts = {n for n in new if n.isdigit() and int(n) not in whole(run)}
        return bool(parts) or any("tmp" in n for n in new)

    return {
        "start": (lambda: True, 1.5),
        "restore": (lambda: said("going on from") or not begin, 0.05),
        "step": (lambda: committed(1), 0.5),
        "save": (saving, 0.3 if "runs" in run.parts else 0.05),
        "second save": (lambda: committed(1) and saving(), 0.05),
        "transition": (
            lambda: any(
                n.startswith(f"{STAGE_END}") for n in names(checkpoints) - begin
            )
            or committed(2), 0.6),
        "evaluation": (
            lambda: bool(names(run / "eval") - evaluations) or committed(4), 0.02),
        "long": (lambda: committed(1), 4.0),
    }  # fmt: skip


def kill_training(
    config_words: list[str],
    run: Path,
    address: str,
    kills: int,
    rng: random.Random,
    log: Path,
) -> tuple[collections.Counter, list[float]]:
    """Kill at least `kills` times, then let it end. Counts, and seconds from each
    start to the first new checkpoint where there was one.

    Args:
      run: where its files are seen; `address`: the run folder.
    """
    counts: collections.Counter = collections.Counter()
    recoveries: list[float] = []
    killed = 0
    words = ["train", str(CONFIG), "--workdir", address, *config_words]
    while True:
        before = whole(run)
        newest = max(before, default=0)
        life = Life(words, log)
        # Late in the run, only kills that cannot let it go far.
        left = (STEPS - newest) / max(kills - killed, 1)
        if killed >= kills:
            kind = ""
        elif newest in range(STAGE_END - 4, STAGE_END + 4):
            kind = rng.choice(["transition", "save", "restore", "evaluation"])
        else:
            # The less of the run is left, the less may a life get done.
            moments = ["start", "restore"]
            moments += ["save", "save", "step", "second save"] * (left > 1)
            moments += ["evaluation", "evaluation", "long"] * (left > 2.2)
            kind = rng.choice(moments if newest < STEPS - 20 else moments[:2])
        if kind:
            happened, delay = aims(run, life, rng)[kind]
            if life.wait_for(happened):
                time.sleep(rng.uniform(0, delay))
            if life.kill():
                killed += 1
                counts[kind] += 1
                newest = max(whole(run), default=0)
                print(f"kill {killed}: {kind}, checkpoint {newest}", flush=True)
        else:
            known = whole(run)
            if life.wait_for(lambda: bool(whole(run) - known)):
                recoveries.append(time.monotonic() - life.begin)
        if life.wait() == -signal.SIGKILL:
            continue
        if life.status != DONE:
            raise SystemExit(f"seed lost: {life.status} {log.read_text()[-3000:]}")
        if killed < kills:
            raise SystemExit(f"complete after {killed} kills only: make the run longer")
        return counts, recoveries


def kill_often(
    words: list[str], kills: int, longest: float, rng: random.Random, log: Path
) -> int:
    """Kill a command at random moments up to `longest` seconds, then let it end."""
    killed = 0
    while True:
        life = Life(words, log)
        if killed < kills:
            end = time.monotonic() + rng.uniform(0, longest)
            life.wait_for(lambda: time.monotonic() > end)
            killed += life.kill()
        if life.wait() == DONE:
            if killed >= kills:
                return killed
        elif life.status != -signal.SIGKILL:
            raise SystemExit(f"{words[:2]}: {life.status} {log.read_text()[-3000:]}")


def run_once(words: list[str], log: Path) -> float:
    life = Life(words, log)
    if life.wait() != DONE:
        raise SystemExit(f"{words[:2]}: {life.status} {log.read_text()[-3000:]}")
    return time.monotonic() - life.begin


def tree_hashes(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part in leave_out for part in p.parts)
    }


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[None]:
    """A server of buckets in a process of its own, for all that is started here."""
    program = Path(__file__).parents[1] / "bucket_server.py"
    command = [sys.executable, str(program), str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as server:
        os.environ.update(json.loads(server.stdout.readline()))
        yield
        server.stdin.close()


def requests() -> dict[str, int]:
    """What the server was asked so far; {} where there is none."""
    if server := os.environ.get("STORAGE_EMULATOR_HOST"):
        with urllib.request.urlopen(f"{server}/counts") as answer:
            return json.load(answer)
    return {}


def since(before: dict[str, int]) -> dict[str, int]:
    now = requests()
    return {k: v - before.get(k, 0) for k, v in now.items()}


def outcome(run: Path) -> dict:
    """All that must be the same: final state, records, evaluations, what was kept."""
    import jax
    import numpy as np

    from gamayun_jax.config import load_config
    from gamayun_jax.model.sharding import make_mesh
    from gamayun_jax.training.checkpoint import Checkpoints
    from gamayun_jax.training.checksums import named_leaves
    from gamayun_jax.training.spool import metric_lines
    from gamayun_jax.training.step import abstract_state

    cfg = load_config(CONFIG)
    store = Checkpoints(run / "checkpoints", read_only=True)
    state = store.restore(STEPS, abstract_state(cfg, make_mesh(cfg.mesh)))
    meta = store.meta(STEPS)
    kept = store.steps()
    store.close()
    lines = [row for _, row in metric_lines(run)]
    records = [{k: v for k, v in row.items() if k != "time"} for row in lines]
    steps = [r["step"] for r in records if r["kind"] == "train"]
    want = sorted({*range(5, STEPS + 1, 5), STAGE_END})
    assert steps == want, f"gap or duplicate in metrics.jsonl: {steps}"
    return {
        "leaves": {
            n: hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
            for n, x in named_leaves(jax.device_get(state))
        },
        "records": records,
        "consumed": meta.consumed,
        "evaluations": {p.name: p.read_text() for p in (run / "eval").glob("*.json")},
        "kept": kept,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of the training")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    parser.add_argument("--every", type=int, default=2, help="steps of a checkpoint")
    parser.add_argument("--bucket", action="store_true", help="train in a bucket")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    rng = random.Random(args.seed)
    work = args.work or Path(tempfile.mkdtemp(prefix="soak-"))
    work.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    from gamayun_jax import train  # noqa: F401  imported once, for all lives

    with contextlib.ExitStack() as stack:
        if args.bucket:
            stack.enter_context(bucket(work / "buckets"))
        same = soak(args, work, rng)
    if not args.work:
        shutil.rmtree(work)
    return 0 if all(same.values()) else 1


def soak(args: argparse.Namespace, work: Path, rng: random.Random) -> dict[str, bool]:
    """All kills; prints what came of them. What is the same in the end."""
    log = work / "log"
    began = time.monotonic()
    corpus, again = work / "corpus", work / "corpus-killed"
    few = max(3, args.kills // 10)

    def build(out: Path) -> list[str]:
        return ["corpus", "build", str(CONFIG), "--out", str(out), "--workers", "1"]

    same, builds, reports = {}, 0, 0
    seconds = run_once(build(corpus), log)
    if not args.bucket:
        builds = kill_often(build(again), few, seconds, rng, log)
        same["corpus"] = tree_hashes(corpus) == tree_hashes(again)
        shutil.rmtree(again)
        print(f"corpus build: {builds} kills, same files: {same['corpus']}", flush=True)

    words = ["--set", f"data.corpus={corpus}"]
    words += ["--set", f"checkpoint.every_steps={args.every}"]
    straight, run = work / "straight", work / "run"
    address = str(run)
    if args.bucket:
        run, address = work / "buckets" / "runs" / "run", "gs://runs/run"
    train_words = ["train", str(CONFIG), "--workdir"]
    seconds = run_once([*train_words, str(straight), *words], log)
    print(f"uninterrupted: {STEPS} steps in {seconds:.0f} s", flush=True)
    if args.bucket:
        before = requests()
        seconds = run_once([*train_words, "gs://runs/straight", *words], log)
        print(f"in a bucket: {seconds:.0f} s, {since(before)}", flush=True)
    before = requests()
    began_training = time.monotonic()
    counts, recoveries = kill_training(words, run, address, args.kills, rng, log)
    spent = time.monotonic() - began_training

    asked = since(before)

    if not args.bucket:
        page = run / "report" / "index.html"
        seconds = run_once(["report", str(straight)], log)
        reports = kill_often(["report", str(run)], few, seconds, rng, log)
        ended = page.read_text().rstrip().endswith("</html>")
        torn = [p for p in page.parent.iterdir() if "tmp" in p.name]
        same["report"] = ended and not torn

    from gamayun_jax.storage import as_path

    a, b = outcome(straight), outcome(as_path(address))
    same |= {key: a[key] == b[key] for key in a}
    lineage = json.loads((as_path(address) / "lineage.json").read_text())
    resumed = sum(e["event"] == "resumed" for e in lineage["events"])
    print(
        json.dumps(
            {
                "seed": args.seed,
                "kills": {
                    "corpus build": builds,
                    "training": sum(counts.values()),
                    "report": reports,
                },
                "training kills by moment": dict(counts),
                "resumes in the surviving lineage": resumed,
                "requests and bytes": asked,
                "same": same,
                "seconds": round(time.monotonic() - began),
                "seconds per killed life of training": round(
                    spent / max(1, sum(counts.values())), 1
                ),
                "last recovery, start to new checkpoint, s": [
                    round(x, 1) for x in recoveries
                ],
            },
            indent=1,
        )
    )
    return same


if __name__ == "__main__":
    sys.exit(main())
