"""A lease on a folder in a bucket: one writer at a time, without a lock of the system.

The lease is an object that its owner writes anew every third of LEASE seconds, each
time under the condition that it is still the object that this owner wrote last. Whoever
wants the folder watches it: unchanged for a whole lease by the watcher's own clock, it
is dead, whatever the machines' clocks say. An owner that could not renew it in time
stops first. What a process sent before it lost its lease may still arrive.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gamayun_jax.buckets import BucketPath, reason_of
from gamayun_jax.fields import UserError
from gamayun_jax.storage import InUseError, bucket_of

LEASE = 60.0  # seconds
LOST = 4  # exit status of a process that lost its lease: it may be started again
MARGIN = 0.9  # of a lease: then an owner that could not renew it stops


class LostError(UserError):
    """The lease is not this process's any more: it must not write."""


class GoogleObject:
    """An object that is written and deleted on the condition that it is a version: by
    generations, of which a bucket at gs:// gives each write a new one."""

    def __init__(self, path: BucketPath, patience: float):
        """`patience`: seconds in which a request that failed is made again."""
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        retry = DEFAULT_RETRY.with_timeout(patience)
        self._patience: dict[str, Any] = {"timeout": patience, "retry": retry}
        bucket, key = bucket_of(path)
        self._bucket, self._key = storage.Client().bucket(bucket), key

    def _blob(self) -> Any:
        """A new one each time: one that was read asks for that generation again."""
        return self._bucket.blob(self._key)

    def read(self) -> tuple[str, Any]:
        """(text, version); ("", None) where there is no object."""
        from google.api_core.exceptions import NotFound

        try:
            # One request; the generation is in its headers.
            blob = self._blob()
            text = blob.download_as_bytes(**self._patience).decode()
            return text, int(blob.generation)
        except NotFound:
            return "", None

    def write(self, text: str, version: Any) -> Any:
        """Write over that version (None: over nothing); the new version, or None if
        another one is there."""
        from google.api_core.exceptions import PreconditionFailed

        try:
            blob = self._blob()
            blob.upload_from_string(
                text, if_generation_match=version or 0, **self._patience
            )
            return int(blob.generation)
        except PreconditionFailed:
            return None

    def delete(self, version: Any) -> None:
        self._blob().delete(if_generation_match=version, **self._patience)


def now() -> float:
    """Seconds of a clock that goes on while the machine sleeps, and is never set."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def started(pid: int) -> str:
    """When a process of this machine began, in ticks; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def this_machine() -> dict[str, str]:
    """What two processes have alike that can see each other by their ids."""

    def read(path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return ""

    try:
        space = os.readlink("/proc/self/ns/pid")  # a container's own
    except OSError:
        space = ""
    boot = read("/proc/sys/kernel/random/boot_id")
    return {"host": platform.node(), "boot": boot, "space": space}


class Lease:
    """The lease of a folder, held from the making of this object to `close`."""

    def __init__(
        self,
        path: BucketPath,
        what: str,
        log: Callable[[str], None] = lambda text: None,
        lost: Callable[[LostError], None] = lambda error: None,
        seconds: float | None = None,
    ):
        """Take the lease; waits for that of an owner who may be gone.

        Args:
          path: of the object.
          what: the beginning of messages: whose lease it is.
          log: told once what is waited for.
          lost: called once, in a thread, when the lease is lost.

        Raises:
          InUseError: another process has it.
          OSError or an error of the server's package: it cannot be reached.
        """
        self._what, self._lost, self._log = what, lost, log
        self._seconds = seconds or LEASE
        self._object = GoogleObject(path, self._seconds / 4)
        self._error: LostError | None = None
        self._id = secrets.token_hex(8)
        self._count = 0
        self._done, self._losing = threading.Event(), threading.Lock()
        self._reason = ""  # why it could not be renewed the last time
        self._take()
        # A request may last longer than the lease does, so another thread watches.
        self._threads = [
            threading.Thread(target=f, name="lease", daemon=True)
            for f in (self._renew, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise LostError if this process must not write any more."""
        if not self._error and now() > self._until:
            self._lose(f"its lease could not be renewed in time ({self._reason})")
        if self._error:
            raise self._error

    def close(self) -> None:
        """Give the lease back; the next one has it at once."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        if not self._error:
            try:
                self._object.delete(self._version)
            except Exception:
                return  # it ends by itself

    def _text(self) -> str:
        self._count += 1
        pid = os.getpid()
        owner = {**this_machine(), "pid": pid, "started": started(pid)}
        owner |= {"id": self._id, "count": self._count, "lease_s": self._seconds}
        return json.dumps(owner) + "\n"

    def _put(self, version: Any) -> bool:
        """Whether the lease is this process's until a lease from now. A write whose
        answer was lost is found by what it wrote."""
        text, begin = self._text(), now()
        made = self._object.write(text, version)
        if made is None:
            there, made = self._object.read()
            if owner_of(there).get("id") != self._id:
                return False
        self._version, self._until = made, begin + MARGIN * self._seconds
        return True

    def _take(self) -> None:
        text, version = self._object.read()
        seen, told = now(), False
        while True:
            owner = owner_of(text)
            theirs = owner.get("lease_s")
            lease = max(self._seconds, theirs if isinstance(theirs, float) else 0.0)
            left = seen + lease - now()
            who = f"{owner.get('host')} (process {owner.get('pid')})"
            if not owner.get("id") or left <= 0 or is_gone(owner):  # or nobody's
                if self._put(version):
                    return
                text, version = self._object.read()
                seen = now()
                continue
            busy = InUseError(
                f"{self._what} is in use by {who}, whose lease ends in {left:.0f} s "
                "unless renewed: wait for it, or give another"
            )
            if is_here(owner):
                raise busy
            if not told:
                told = True
                self._log(
                    f"{self._what} was last written by {who}: its lease ends in "
                    f"{left:.0f} s unless that process renews it"
                )
            time.sleep(min(max(left, 0.0), lease / 20) + 0.01)
            text, newer = self._object.read()
            if newer is not None and newer != version:
                raise busy
            version = newer

    def _renew(self) -> None:
        pause = self._seconds / 3
        while not self._done.wait(pause) and not self._error:
            pause = self._seconds / 3
            try:
                if not self._put(self._version):
                    text, _ = self._object.read()
                    owner = owner_of(text)
                    who = f"{owner.get('host')} (process {owner.get('pid')})"
                    self._lose(f"{who if owner else 'somebody'} took it over")
            except Exception as e:  # of the network, of several packages
                self._reason = " ".join(str(e).split())[:200]
                pause = self._seconds / 20

    def _watch(self) -> None:
        while not self._error and not self._done.wait(max(0.0, self._until - now())):
            if now() >= self._until:
                self._lose(f"its lease could not be renewed in time ({self._reason})")

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self._error or self._done.is_set():
                return
            self._error = LostError(
                f"{self._what}: {reason}; this process writes nothing there any more. "
                "What is there goes on with whoever has it; to go on here, start again"
            )
        self._lost(self._error)


def owner_of(text: str) -> dict[str, Any]:
    """Who wrote a lease; {} if it does not say."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def on_this_machine(owner: dict[str, Any]) -> bool:
    """Whether this process can see whether the owner lives."""
    here = this_machine()
    return bool(here["boot"]) and all(owner.get(k) == v for k, v in here.items())


def is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that lives."""
    pid = owner.get("pid")
    if not on_this_machine(owner) or not isinstance(pid, int):
        return False
    return bool(started(pid)) and started(pid) == owner.get("started")


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    return on_this_machine(owner) and not is_here(owner)


def take(
    path: Any, what: str, log: Callable[[str], None], own_process: bool = False
) -> Lease:
    """The lease of a folder; see `Lease`.

    Args:
      own_process: end the process at once if the lease is lost, whatever it is at.

    Raises:
      InUseError: another process has it.
      UserError: the bucket cannot be written.
    """

    def end(error: LostError) -> None:
        print(f"gamayun: {error}", file=sys.stderr, flush=True)
        os._exit(LOST)

    try:
        return Lease(path, what, log, end if own_process else lambda error: None)
    except UserError:
        raise
    except Exception as e:  # of several packages
        raise UserError(f"{what} cannot be written: {reason_of(e, path)}") from e
