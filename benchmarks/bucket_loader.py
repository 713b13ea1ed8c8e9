"""The loader on a corpus in a bucket: a request a record against blocks in a cache.

    pip install -e '.[dev]'
    python benchmarks/bucket_loader.py [--latency 0.02] [--tokens 4e6]

A server of buckets on this machine, in a process of its own, waits so long before each
answer. Twelve sources mixed by weight, examples of 4,096 tokens as uint16, 8 a step, as
one of 64 hosts has them of a batch of 512. Turns: as fast as the loader gives batches,
by the number of requests under way; a step every second, as a pod takes it; and, in
place of range reads, blocks of 4 MB read ahead into a cache that holds a part of the
corpus and lets go of the block whose last use is longest ago.

Figures: see docs/speed.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import loader as of_disks
import numpy as np
from rows import row

from gamayun_jax.config import Config
from gamayun_jax.data import copy_corpus, loader, records
from gamayun_jax.data.corpus import Corpus, open_corpus
from gamayun_jax.data.plan import make_data_plan

of_disks.T = 4096
TESTS = Path(__file__).parents[1] / "tests"
SERVER = """
import http.server, json, sys
sys.path.insert(0, sys.argv[1])
import bucket_server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if latency := self.path.strip("/"):
            proxy.reset()
            proxy.latency = float(latency)
        told = [sum(proxy.counts.values()), proxy.received]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

    def log_message(self, *_):
        pass

bucket_server.Proxy.request_queue_size = 256
with bucket_server.bucket_server() as proxy:
    control = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(json.dumps([bucket_server.environment(proxy.url), control.server_port]))
    sys.stdout.flush()
    try:
        control.serve_forever()
    except KeyboardInterrupt:
        pass
"""


class Blocks:
    """A shard in a bucket, read by blocks of 4 MB that a cache shares."""

    budget = 0.0  # bytes of all blocks that are kept
    kept: collections.OrderedDict[Any, bytes]
    under_way: dict[Any, threading.Event]
    lock = threading.Lock()

    def __init__(self, path: str, size: int):
        self._path, self._size = path, size
        self._stride = size + records.CHECKSUM
        self._per = (4 << 20) // self._stride
        bucket, _, self._key = path.partition("://")[2].partition("/")
        self._store = records.bucket_store("gs", bucket)

    def block(self, number: int) -> bytes:
        key = self._path, number
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
            event, mine = self.under_way.get(key), threading.Event()
            if event is None:
                self.under_way[key] = mine
        if event:
            event.wait()
            return self.block(number)
        begin = number * self._per * self._stride
        part = slice(begin, min(begin + self._per * self._stride, SIZES[self._path]))
        try:
            data = self._store.read(self._key, byte_range=part).result().value
            with self.lock:
                self.kept[key] = data
                while sum(map(len, self.kept.values())) > self.budget:
                    self.kept.popitem(last=False)
        finally:
            with self.lock:
                self.under_way.pop(key, None)
            mine.set()
        return data

    def read(self, number: int) -> bytes:
        block, inside = divmod(number, self._per)
        begin = inside * self._stride
        data = self.block(block)[begin : begin + self._stride]
        return records.checked_record(data, number, self._size)


SIZES: dict[str, int] = {}


def turn(
    name: str,
    cfg: Config,
    corpus: Corpus,
    ask: Any,
    rows: int = 8,
    pause: float = 0.0,
    steps: int = 60,
) -> None:
    """Print what the loader gives while each step takes `pause` seconds."""
    data = dataclasses.replace(
        cfg.data,
        threads=4,
        prefetch=8,
        batch_size=rows,
        block_examples=4 * rows,
        retry_seconds=0.0,  # the server goes before the last requests
    )
    cfg = dataclasses.replace(cfg, data=data)
    records.OPEN.forget(SIZES)
    ask(True)
    batches = iter(
        loader.local_batches(
            cfg, corpus, make_data_plan(cfg, corpus), np.arange(rows), 0
        )
    )
    begin = time.perf_counter()
    next(batches)
    first, waits = time.perf_counter() - begin, []
    begin = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(pause)
    seconds = time.perf_counter() - begin
    requests, received = ask(False)
    waited = sum(w > 0.005 for w in waits)
    row(name, "steps/s", [steps / seconds])
    row(f"{name}: requests", "a step", [requests / steps])
    row(f"{name}: received", "KB a step", [received / steps / 1e3])
    print(
        f"{'':>40}  first batch after {first:.2f} s; {waited} of {steps} steps waited"
    )


def turns(cfg: Config, corpus: Corpus, ask: Any) -> None:
    for requests in (1, 8, 32, 64):
        loader.REQUESTS = requests
        steps = 30 if requests == 1 else 150
        turn(f"range reads, {requests} under way", cfg, corpus, ask, steps=steps)
    loader.REQUESTS = 32
    turn("range reads, a step a second", cfg, corpus, ask, pause=1.0, steps=10)
    turn("range reads, large batch", cfg, corpus, ask, rows=128, steps=12)
    total = sum(SIZES.values())
    for share in (0.1, 0.5, 1.1):
        Blocks.budget, Blocks.kept = share * total, collections.OrderedDict()
        Blocks.under_way = {}
        former, records.BucketShard = records.BucketShard, Blocks  # type: ignore[misc, assignment]
        turn(f"blocks, cache of {share:.0%}", cfg, corpus, ask)
        records.BucketShard = former  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.02, help="of each request")
    parser.add_argument("--tokens", type=float, default=4e6, help="of each source")
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(TESTS)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        environment, port = json.loads(server.stdout.readline())
        os.environ.update(environment)

        def ask(reset: bool) -> Any:
            path = str(args.latency) if reset else ""
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as found:
                return json.load(found)

        with tempfile.TemporaryDirectory() as folder:
            cfg, _ = of_disks.make_corpus(Path(folder, "corpus"), int(args.tokens))
            # The hashes of its manifest are of shards that were grown since.
            copy_corpus.known_hashes = lambda manifest: {}  # type: ignore[assignment]
            copy_corpus.copy_corpus(
                Path(folder, "corpus"), "gs://runs/c", lambda _: None
            )
        ask(True)
        corpus = open_corpus("gs://runs/c")
        SIZES.update(copy_corpus.sizes_below(corpus.folder / "sources"))
        print(f"opened by {ask(False)[0]} requests, {sum(SIZES.values()) / 1e6:.0f} MB")
        turns(cfg, corpus, ask)
    finally:
        server.send_signal(2)
        server.wait()


if __name__ == "__main__":
    main()
