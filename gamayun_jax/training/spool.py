"""Files of a run folder that grow: its records, and what was set aside.

On a file system they are appended to. A bucket has no appending: there they are written
on this machine and put into the bucket again as they are, at most every PERIOD seconds
and before a checkpoint. So that little is sent twice, records go to numbered files,
metrics/<number>.jsonl, a new one once the last is longer than CHUNK.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gamayun_jax.data.files import atomic, json_lines
from gamayun_jax.storage import is_bucket, process_folder, remove_tree
from gamayun_jax.training.ticker import ticker

PERIOD = 30.0  # seconds between uploads
CHUNK = 2**20  # bytes


class Spool:
    """Where growing files of a run folder are written.

    Attributes:
      folder: the run folder itself; of one in a bucket, a temporary folder here.
    """

    def __init__(self, run: Path, check: Callable[[], None] = lambda: None):
        """`check` raises what forbids an upload."""
        self.run, self._check = run, check
        self.remote = is_bucket(run)
        self.folder = run
        if self.remote:
            self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=process_folder()))
        self.lock = threading.RLock()  # held while a file is written or read
        self._uploads = (
            threading.Lock()
        )  # one at a time, which nobody who writes awaits
        self._sent: dict[Path, tuple[int, int]] = {}
        self._stack = contextlib.ExitStack()
        if self.remote:
            self._stack.enter_context(ticker(PERIOD, self._try))

    def sync(self) -> None:
        """Put into the bucket what has changed.

        Raises:
          OSError: it cannot be reached.
        """
        with self._uploads:
            for path in sorted(self.folder.rglob("*")) if self.remote else ():
                if path.is_file():
                    self._send(path)

    def _send(self, path: Path) -> None:
        with self.lock:
            stat = path.stat()
            state = stat.st_size, stat.st_mtime_ns
            if not stat.st_size or self._sent.get(path) == state:
                return
            data = path.read_bytes()
        self._check()
        (self.run / path.relative_to(self.folder).as_posix()).write_bytes(data)
        self._sent[path] = state

    def _try(self) -> None:
        with contextlib.suppress(Exception):  # of a network: again in a while
            self.sync()

    def close(self) -> None:
        """Put the rest into the bucket, as far as that can be done."""
        self._stack.close()
        if self.remote:
            self._try()
            shutil.rmtree(self.folder, ignore_errors=True)


def record_files(run: Path) -> list[Path]:
    """The files with the records of training of a run folder, in their order."""
    whole, folder = run / "metrics.jsonl", run / "metrics"
    parts = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [*([whole] if whole.is_file() else []), *parts]


def metric_lines(run: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """(line, the record in it or None) of a run folder's records of training."""
    data = b"".join(path.read_bytes() for path in record_files(run))
    return list(json_lines(data))


def records_until(step: int, files: list[bytes]) -> tuple[list[bytes], list[int]]:
    """What stays of records that go on in several files if those after `step` go; and
    the numbers, over all files, of lines that are damaged and stay as they are."""
    kept, damaged, later, number = [], [], False, 0
    for data in files:
        lines = list(json_lines(data))
        if data[-1:] != b"\n" and lines and lines[-1][1] is None:
            lines.pop()  # torn by a crash: it will be made again
        some: list[bytes] = []
        for line, record in lines:
            number += 1
            at = record.get("step") if record else None
            if isinstance(at, int) and at > step:
                later = True
            elif isinstance(at, int) or not later:
                some.append(line + b"\n")
                damaged += [] if isinstance(at, int) else [number]
        kept.append(b"".join(some))
    return kept, damaged


class RecordLog:
    """The records of training, open for more."""

    def __init__(self, spool: Spool):
        self._spool = spool
        self._file: Any = None
        self._number = 0

    def start(self, step: int) -> list[int]:
        """Drop what was recorded after `step`, which will be made again; open for more.

        At step 0 everything goes: it is of another start.

        Returns:
          numbers of lines that are damaged, and stay as they are.
        """
        self.close()
        self._spool.sync()
        run = self._spool.run
        paths = record_files(run)
        data = [path.read_bytes() if step else b"" for path in paths]
        kept, damaged = records_until(step, data)
        if self._spool.remote:
            for k in reversed(range(len(paths))):  # a crash leaves no gap
                if not kept[k]:
                    paths[k].unlink()
                elif kept[k] != data[k]:
                    paths[k].write_bytes(kept[k])
            remove_tree(self._spool.folder / "metrics")
            numbers = [int(p.stem) for p in paths if p.stem.isdecimal()]
            self._number = max(numbers, default=0)
            self._next()
        else:
            with atomic(run / "metrics.jsonl") as temporary:
                temporary.write_bytes(b"".join(kept))
            remove_tree(run / "metrics")  # of a run that was in a bucket
            self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        return damaged

    def _next(self) -> None:
        self.close()
        self._number += 1
        folder = self._spool.folder / "metrics"
        folder.mkdir(exist_ok=True)
        path = folder / f"{self._number:08d}.jsonl"
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is durable once `sync` returns."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with self._spool.lock:
            if self._spool.remote and self._file.tell() > CHUNK:
                self._next()
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Force the records to the disk, or into the bucket."""
        if self._spool.remote:
            self._spool.sync()
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


class BadRecordLog:
    """What a process met in the corpus and could not use, each record once, in
    set_aside.<process>.jsonl of the run folder."""

    def __init__(self, spool: Spool, process: int):
        self._spool = spool
        self._path = spool.folder / f"set_aside.{process}.jsonl"
        self._known: set[tuple[str, int]] = set()
        self.counts: dict[str, int] = {}  # by source
        former = spool.run / self._path.name
        data = former.read_bytes() if former.exists() else b""
        if spool.remote and data:
            self._path.write_bytes(data)
        for _, row in json_lines(data):
            try:
                self._count(row["source"], row["shard"], row["record"])  # type: ignore[index]
            except (KeyError, TypeError):
                continue  # torn by a crash: it will be met again

    def _count(self, source: str, shard: str, record: int) -> bool:
        new = (shard, record) not in self._known
        self._known.add((shard, record))
        self.counts[source] = self.counts.get(source, 0) + new
        return new

    def __call__(self, source: str, shard: str, record: int, reason: str) -> None:
        """Note a record; called from the loader's threads."""
        with self._spool.lock:
            if not self._count(source, shard, record):
                return
            row = dict(source=source, shard=shard, record=record, reason=reason)
            with open(self._path, "a", encoding="utf-8") as f:
                f.write("\n" * (f.tell() > 0) + json.dumps(row, ensure_ascii=False))
