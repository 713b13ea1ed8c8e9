"""Records of a corpus: random access to many shards, some of them away or damaged.

A shard is a flat file: records of one length, each with a checksum behind it, and no
index. So a record is one read at a place that is computed, and neither memory nor the
time to begin grows with a corpus. Corpora of former versions have ArrayRecord files.
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gamayun_jax.config import UserError
from gamayun_jax.data.files import first_line, open_files_limit, unreadable

MOST = 1024  # files that are kept open, where the system allows more
COPY_AGAIN = "copy or build the corpus again"
READ_ERRORS = (RuntimeError, ValueError, OSError, IndexError)  # of both formats
CHECKSUM = 4  # bytes behind a record


def with_checksum(record: bytes, number: int) -> bytes:
    """A record as a flat shard has it: its bytes, then their CRC-32, little-endian.

    The sum begins with the record's number, so that one in another's place is found.
    """
    return record + zlib.crc32(record, number).to_bytes(CHECKSUM, "little")


class FlatShard:
    """An open flat shard of records of `size` bytes each; closed when let go of."""

    def __init__(self, path: str, size: int):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._size, self._stride = size, size + CHECKSUM

    def __len__(self) -> int:
        """Number of records; ValueError if the last one is cut."""
        count, rest = divmod(os.fstat(self._file).st_size, self._stride)
        if rest:
            raise ValueError(f"its last record has {rest} of {self._stride} bytes")
        return count

    def read(self, number: int) -> bytes:
        """A record's bytes; ValueError if it is cut or changed."""
        data = os.pread(self._file, self._stride, number * self._stride)
        if len(data) != self._stride:
            raise ValueError(f"{len(data)} of its {self._stride} bytes are there")
        if with_checksum(record := data[: self._size], number) != data:
            raise ValueError("its bytes are not those of its checksum")
        return record


class ArrayRecordShard:
    """An open ArrayRecord file; its index takes about 50 bytes a record."""

    def __init__(self, path: str, size: int):
        # Whether it can be opened, and the system's error if not.
        open(path, "rb").close()
        self._reader = ArrayRecordReader(
            path, options="readahead_buffer_size:0", file_reader_buffer_size=32_768
        )

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, number: int) -> bytes:
        """A record's bytes; raises what ArrayRecord does."""
        return self._reader.read([number])[0]


class Shard(Protocol):
    """An open file of records. Thread-safe."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> bytes:
        """A record's bytes; raises one of READ_ERRORS."""
        ...


# By the format that a manifest names.
SHARDS: dict[int, Callable[[str, int], Shard]] = {1: ArrayRecordShard, 2: FlatShard}


class BadRecordError(UserError):
    """A record that cannot be used; names the shard, the record and the reason."""

    def __init__(self, shard: str, record: int, reason: str):
        super().__init__(
            f"shard {shard}, record {record}: {reason}: {COPY_AGAIN}, or set "
            "data.faults=set_aside to go on without such records"
        )
        self.shard, self.record, self.reason = shard, record, reason


class OpenShards:
    """The shards that this process keeps open: the ones used last, however many a
    corpus has. Thread-safe."""

    def __init__(self, limit: int = 0):
        """`limit`: of open files; default: half of what the system allows, or MOST."""
        self._limit = limit
        self._lock = threading.Lock()
        self._open: dict[str, Shard] = {}  # the one used last comes last

    def read(self, path: str, number: int, open_shard: Callable[[str], Shard]) -> bytes:
        """A record's bytes; raises one of READ_ERRORS."""
        if (shard := self._open.get(path)) is None:
            shard = open_shard(path)
        with self._lock:
            self._limit = self._limit or min(open_files_limit() // 2, MOST)
            self._open.pop(path, None)
            self._open[path] = shard
            # One that is being read is closed by the last thread that lets go of it.
            while len(self._open) > self._limit:
                del self._open[next(iter(self._open))]
        return shard.read(number)

    def forget(self, paths: Iterable[str]) -> None:
        """Open these files anew when they are read again."""
        with self._lock:
            for path in paths:
                self._open.pop(path, None)

    def __len__(self) -> int:
        return len(self._open)


OPEN = OpenShards()


class Records(Sequence):
    """A source's records, int32[record_tokens + 1] each. Picklable, thread-safe.

    Both formats have checksums, so changed bytes are an error here, as are token ids
    beyond the vocabulary. A file that cannot be read at all is tried again for
    `retry_seconds`, since file systems come back.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        dtype: str,
        vocab_size: int,
        length: int,
        shard_format: int,
        retry_seconds: float = 0.0,
        damaged: Mapping[str, str] | None = None,
    ):
        """A source's records.

        Args:
          shards: (file, its number of records) of each.
          length: tokens of each record.
          shard_format: of the files, one of SHARDS.
          damaged: file -> reason never to read it.
        """
        self._files = [file for file, _ in shards]
        OPEN.forget(self._files)  # they may have changed
        self._ends = list(itertools.accumulate(n for _, n in shards))
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._vocab_size, self._length = vocab_size, length
        self._format = shard_format
        self._retry_seconds = retry_seconds
        self._damaged = dict(damaged or {})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} is outside 0..{len(self) - 1}")
        tokens = np.frombuffer(self._read(int(i)), self._dtype)
        if len(tokens) != self._length or tokens.max() >= self._vocab_size:
            reason = f"{len(tokens)} tokens, {self._length} expected"
            if len(tokens) == self._length:
                reason = f"token id {tokens.max()} is beyond the {self._vocab_size}"
            raise BadRecordError(*self.locate(i), reason)
        return tokens.astype(np.int32)

    def _read(self, i: int) -> bytes:
        shard, record = self.locate(i)
        begin, pause = time.monotonic(), 0.1
        could_be_read = False
        while shard not in self._damaged:
            try:
                return OPEN.read(shard, record, self._open)
            except READ_ERRORS as e:
                reason = first_line(e)
            OPEN.forget([shard])
            try:
                with open(shard, "rb") as f:
                    f.read(1)
                if could_be_read:
                    raise BadRecordError(shard, record, reason)
                could_be_read = True  # once more: it may have come back just now
            except OSError as e:  # the file system's fault: it may come back
                waited = time.monotonic() - begin
                if waited >= self._retry_seconds:
                    self._damaged[shard] = f"{e.strerror}, for {waited:.0f} s"
                    break
                time.sleep(pause)
                pause = min(2 * pause, 10.0)
        raise BadRecordError(shard, record, self._damaged[shard])

    def _open(self, file: str) -> Shard:
        return SHARDS[self._format](file, self._length * self._dtype.itemsize)

    def locate(self, i: int) -> tuple[str, int]:
        """(file, number of the record in it) of record number `i`."""
        k = bisect.bisect_right(self._ends, i)
        return self._files[k], i - (self._ends[k - 1] if k else 0)


def check_shard(path: Path, records: int, size: int, shard_format: int) -> None:
    """Raise UserError unless a shard can be read and has so many records of `size`
    bytes."""
    try:
        shard = SHARDS[shard_format](str(path), size)
        number = len(shard)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"shard {path} is missing: {COPY_AGAIN}") from e
    except OSError as e:
        raise unreadable(path, e) from e
    except READ_ERRORS as e:
        raise UserError(
            f"shard {path} is damaged ({first_line(e)}): {COPY_AGAIN}"
        ) from e
    if number != records:
        raise UserError(
            f"shard {path} has {number} records, {records} expected: {COPY_AGAIN}"
        )
