"""The loader on a corpus of 600M records: time to begin, memory, reading everywhere.

    python benchmarks/large_corpus.py [--records 600000000] [--shards 10000]

A corpus of 2.5T tokens in sparse files: 12 languages, records of 4,096 tokens in four
bytes each, batches of 512. Only the records that are read are written, at their places,
with their checksums. All else is what training does: the corpus is opened and its
shards are looked at, the plan is made, batches of steps from all over the run are read.
Each size is a process of its own, so that memory can be compared; the smaller has a
hundredth of the records and shards. Beside them one shard as ArrayRecord, the former
format.

Figures: see docs/speed.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rows import row

from gamayun_jax import config as c
from gamayun_jax.data import build, loader, records
from gamayun_jax.data.corpus import open_corpus
from gamayun_jax.data.plan import make_data_plan

T, B = 4096, 512
ROWS = 8  # of a batch, as one host of 64 reads
SIZE = 4 * (T + 1)  # bytes of a record
TINY = Path(__file__).parents[1] / "experiments" / "tiny.py"


def config(folder: Path, total: int) -> c.Config:
    """The demo's two stages, over as many tokens as the corpus has."""
    replace = dataclasses.replace
    cfg = c.load_config(TINY)
    shares = {f"{k}/help": 1 / len(cfg.languages) for k in cfg.languages}
    stages = tuple(
        replace(
            s,
            tokens=int(total * T * share) // (T * B) * T * B,
            mixture=c.MixtureConfig("explicit", {**shares, "en/hq": 0.0}),
            schedule=c.ScheduleConfig(warmup_tokens=0),
        )
        for s, share in zip(cfg.stages, (0.8, 0.19), strict=True)
    )
    return replace(
        cfg,
        model=replace(cfg.model, max_seq_len=T),
        corpus=replace(cfg.corpus, record_tokens=T),
        data=c.DataConfig(str(folder), seq_len=T, batch_size=B),
        stages=stages,
    )


def make_corpus(folder: Path, total: int, shards: int) -> None:
    """The demo's corpus with its shards replaced by sparse ones."""
    cfg = config(folder, total)
    build.build(cfg, folder, progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [name for name in manifest["sources"] if name != "en/hq"]
    for name in names:
        count, each = shards // len(names), total // shards
        rows = []
        for k in range(count):
            file = f"sources/{name}/{k:05d}.records"
            with open(folder / file, "wb") as f:
                f.truncate(each * (SIZE + records.CHECKSUM))
            rows.append({"file": file, "records": each, "sha256": f"{k:064x}"})
        manifest["sources"][name] |= {"shards": rows, "records": count * each}
        manifest["sources"][name]["tokens"] = count * each * T
    source = manifest["sources"]["en/hq"]
    path = folder / source["shards"][0]["file"]
    path.write_bytes(records.with_checksum(bytes(SIZE), 0))
    source["shards"] = [{**source["shards"][0], "records": 1}]
    source["records"] = 1
    manifest["dtype"] = "uint32"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resident() -> float:
    """MiB of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(folder: Path, total: int, reads: int) -> dict[str, float]:
    """Begin as training does, and read `reads` examples from all over the run."""
    imported = resident()
    cfg = config(folder, total)
    begin, cpu = time.perf_counter(), time.process_time()
    corpus = open_corpus(folder)
    opened = time.perf_counter()
    plan = make_data_plan(cfg, corpus)
    sources = [corpus.records(name) for name in plan.sources]
    batches = loader.LocalBatches(cfg, corpus, plan, np.arange(ROWS), records=sources)
    ready, spent = time.perf_counter(), time.process_time() - cpu
    begun = resident()
    steps = np.random.default_rng(0).integers(0, len(batches), reads // ROWS).tolist()
    examples = [np.arange(ROWS) + step * B for step in steps]
    places = [plan.lookup(x) for x in examples]
    touched = write_what_is_read(sources, batches, places)
    wall, cpu = time.perf_counter(), time.process_time()
    for step in steps:
        batches[step]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "open, s": opened - begin,
        "plan, s": ready - opened,
        "both, CPU s": spent,
        "imports, MiB": imported,
        "begun, MiB": begun,
        "read, MiB": resident(),
        "open files": len(os.listdir("/proc/self/fd")),
        "shards read": touched,
        "batches, M tokens/s": len(steps) * ROWS * T / wall / 1e6,
        "batches, M tokens per CPU second": len(steps) * ROWS * T / cpu / 1e6,
    }


def write_what_is_read(
    sources: list[records.Records],
    batches: loader.LocalBatches,
    places: list[tuple[np.ndarray, np.ndarray]],
) -> int:
    """Write the records at these places of the sources' orders, as the plan looks them
    up; returns how many shards have them."""
    rng = np.random.default_rng(0)
    files = set()
    for datasets, positions in places:
        for dataset, position in zip(datasets, positions.tolist(), strict=True):
            source = sources[dataset % len(sources)]
            file, number = source.locate(batches.order[dataset][position])
            tokens = rng.integers(3, 2000, T + 1).astype("<u4").tobytes()
            with open(file, "r+b") as f:
                f.seek(number * (SIZE + records.CHECKSUM))
                f.write(records.with_checksum(tokens, number))
            files.add(file)
    return len(files)


def array_record(folder: Path, count: int, reads: int) -> dict[str, float]:
    """One shard of the former format."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(folder / "former.arrayrecord")
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    for _ in range(count):
        writer.write(bytes(SIZE))
    writer.close()
    before, begin = resident(), time.perf_counter()
    shard = records.ArrayRecordShard(path, SIZE)
    shard.read(0)
    opened, index = time.perf_counter() - begin, resident() - before
    cpu = time.process_time()
    for number in np.random.default_rng(0).integers(0, count, reads).tolist():
        shard.read(number)
    cpu = time.process_time() - cpu
    return {
        "a shard opened, s": opened,
        "index, bytes a record": index * 2**20 / count,
        "on disk, bytes a record": os.path.getsize(path) / count,
        "records alone, M tokens per CPU second": reads * T / cpu / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=600_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--reads", type=int, default=40_000, help="examples read")
    parser.add_argument("--former", type=int, default=60_000, metavar="RECORDS")
    parser.add_argument(
        "--worker", choices=("measure", "former"), help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "measure":
        print(json.dumps(measure(args.folder, args.records, args.reads)))
    elif args.worker:
        print(json.dumps(array_record(args.folder, args.former, args.reads)))
    if args.worker:
        return

    def run(about: str, worker: str, folder: str, *words: str) -> None:
        command = [sys.executable, __file__, "--worker", worker, "--folder", folder]
        numbers = ["--reads", str(args.reads), "--former", str(args.former)]
        output = subprocess.check_output([*command, *numbers, *words], text=True)
        for name, value in json.loads(output).items():
            what, _, unit = name.partition(", ")
            row(f"{about}: {what}", unit, [value])

    for part in (100, 1):
        total, shards = args.records // part, max(args.shards // part, 12)
        with tempfile.TemporaryDirectory() as folder:
            make_corpus(Path(folder), total, shards)
            about = f"{total:,} records in {shards:,} shards"
            run(about, "measure", folder, "--records", str(total))
    with tempfile.TemporaryDirectory() as folder:
        run("ArrayRecord", "former", folder)


if __name__ == "__main__":
    main()
