"""Records of a corpus: random access to many shards, some of them away or damaged.

A shard is a flat file: records of one length, each with a checksum behind it, and no
index. So a record is one read at a place that is computed, and neither memory nor the
time to begin grows with a corpus. Corpora of former versions have ArrayRecord files.
"""

from __future__ import annotations

import bisect
import functools
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
from gamayun_jax.storage import bucket_of, is_bucket, scheme_of

MOST = 1024  # files that are kept open, where the system allows more
COPY_AGAIN = "copy or build the corpus again"
READ_ERRORS = (RuntimeError, ValueError, OSError, IndexError)  # of both formats
CHECKSUM = 4  # bytes behind a record
# Of a record in a bucket: half a minute is a hundred times what a request takes.
REQUEST_SECONDS = 30.0


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
        return records_in(os.fstat(self._file).st_size, self._size)

    def read(self, number: int) -> bytes:
        """A record's bytes; ValueError if it is cut or changed."""
        data = os.pread(self._file, self._stride, number * self._stride)
        return checked_record(data, number, self._size)


class BucketShard:
    """A flat shard in a bucket: a record is one request for its bytes.

    Nothing is read ahead and nothing kept: an epoch reads each record once, in an order
    that goes over the whole source, so that neighbours are wanted hours apart.
    """

    def __init__(self, path: str, size: int):
        self._path, self._size, self._stride = path, size, size + CHECKSUM
        bucket, self._key = bucket_of(path)
        self._store = bucket_store(scheme_of(path), bucket)

    def read(self, number: int) -> bytes:
        """A record's bytes; ValueError if it is cut or changed, FileNotFoundError for
        no shard, OSError for anything else that the bucket or the network says."""
        begin = number * self._stride
        try:
            found = self._store.read(
                self._key, byte_range=slice(begin, begin + self._stride)
            ).result(timeout=REQUEST_SECONDS)
        except TimeoutError as e:
            raise OSError(f"no answer in {REQUEST_SECONDS:.0f} s") from e
        except Exception as e:
            if "OUT_OF_RANGE" in str(e):
                raise ValueError("the shard ends before it or inside of it") from e
            raise OSError(first_line(e)) from e
        if found.state == "missing":
            raise FileNotFoundError(2, "the bucket has no such object", self._path)
        return checked_record(found.value, number, self._size)


@functools.cache
def bucket_store(scheme: str, bucket: str) -> Any:
    """TensorStore's view of a bucket, with its connections, shared by all shards. It
    retries what passes in a second; `Records` tries for longer."""
    import tensorstore

    driver = {"gs": "gcs", "s3": "s3"}[scheme]
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        spec["endpoint"] = endpoint
    retries = {"max_retries": 3, "initial_delay": "100ms", "max_delay": "1s"}
    context = tensorstore.Context({f"{driver}_request_retries": retries})
    return tensorstore.KvStore.open(spec, context=context).result()


def checked_record(data: bytes, number: int, size: int) -> bytes:
    """The record in the bytes of one and its checksum; ValueError if it is cut or
    changed."""
    if len(data) != size + CHECKSUM:
        raise ValueError(f"{len(data)} of its {size + CHECKSUM} bytes are there")
    if with_checksum(record := data[:size], number) != data:
        raise ValueError("its bytes are not those of its checksum")
    return record


def records_in(file_bytes: int, size: int) -> int:
    """Records of `size` bytes in a flat shard; ValueError if the last one is cut."""
    count, rest = divmod(file_bytes, size + CHECKSUM)
    if rest:
        raise ValueError(f"its last record has {rest} of {size + CHECKSUM} bytes")
    return count


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

    def read(self, number: int) -> bytes:
        """A record's bytes; raises one of READ_ERRORS."""
        ...


# By the format that a manifest names. In a bucket only the second is read.
SHARDS: dict[int, Callable[[str, int], FlatShard | ArrayRecordShard]] = {
    1: ArrayRecordShard,
    2: FlatShard,
}


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
                reason, away = first_line(e), why_away(shard, e)
            OPEN.forget([shard])
            if away is None:
                if could_be_read:
                    raise BadRecordError(shard, record, reason)
                could_be_read = True  # once more: it may have come back just now
                continue
            waited = time.monotonic() - begin
            if waited >= self._retry_seconds:
                self._damaged[shard] = f"{away}, for {waited:.0f} s"
                break
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
        raise BadRecordError(shard, record, self._damaged[shard])

    def _open(self, file: str) -> Shard:
        size = self._length * self._dtype.itemsize
        return (
            BucketShard(file, size)
            if is_bucket(file)
            else SHARDS[self._format](file, size)
        )

    def locate(self, i: int) -> tuple[str, int]:
        """(file, number of the record in it) of record number `i`."""
        k = bisect.bisect_right(self._ends, i)
        return self._files[k], i - (self._ends[k - 1] if k else 0)


def why_away(shard: str, error: BaseException) -> str | None:
    """Why a file cannot be read at all, which may pass; None if it is its bytes that
    are wrong. Of one in a bucket the failed request itself tells."""
    if is_bucket(shard):
        if not isinstance(error, OSError):
            return None
        return error.strerror or first_line(error)
    try:
        with open(shard, "rb") as f:
            f.read(1)
    except OSError as e:
        return e.strerror or first_line(e)
    return None


def check_shard(
    path: Path,
    records: int,
    size: int,
    shard_format: int,
    listed: Mapping[str, int] | None = None,
) -> None:
    """Raise UserError unless a shard can be read and has so many records of `size`
    bytes.

    Args:
      listed: object -> bytes, of a corpus in a bucket: one listing instead of a request
        for every shard.
    """
    try:
        if listed is None:
            number = len(SHARDS[shard_format](str(path), size))
        elif (there := listed.get(str(path))) is None:
            raise FileNotFoundError
        else:
            number = records_in(there, size)
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
