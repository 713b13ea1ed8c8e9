"""Several processes that train together: none waits for another for ever.

Each one tells JAX's coordination service, once a second, that it lives. The first
looks at what they told; when one has been silent too long, or says that it failed,
all of them end with status LOST and the reason, whatever they are waiting for. The
launcher then starts all of them again. If the first one itself is lost, so is the
service: JAX may end the process before this module does (SIGABRT, status 134).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gamayun_jax.config import UserError
from gamayun_jax.data.files import write_text
from gamayun_jax.fields import causes_of

LOST = 4  # exit status of a process that another one has left alone
FAILED, ALIVE = "gamayun/failed/", "gamayun/alive/"
FIRST = (f"gamayun/first/{k}" for k in itertools.count())  # keys, one a call


# How an absl::Status begins as text. JAX raises it as JaxRuntimeError, or, where a
# compiled function finds it on its fast path, as ValueError.
STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
# What a lone process or bad input can cause too.
OWN = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"}
BROKEN = {
    "ABORTED", "CANCELLED", "DATA_LOSS", "DEADLINE_EXCEEDED", "FAILED_PRECONDITION",
    "INTERNAL", "UNAVAILABLE", "UNKNOWN",
}  # fmt: skip
# What carries collectives (CPU: Gloo; GPU: NCCL; TPU: Megascale between slices), and
# the service by which processes know each other.
CARRIERS = re.compile(
    r"\b(?:gloo|nccl|megascale|coordination.?service|ici link|slice.failure)"
    r"|connection .{0,20}\bpeer\b",
    re.IGNORECASE,
)

# How TensorStore's errors, of files, are told from those of collectives.
FILES = re.compile("tensorstore|http_response_code=|CURL error", re.IGNORECASE)


def is_loss(error: BaseException) -> bool:
    """Whether an error, or what it came from, is a collective that broke."""
    files = False
    for found in causes_of(error, contexts=True):
        text = str(found)
        status = STATUS.match(text)
        code = status[1] if status else ""
        # TensorStore's are ValueErrors as collectives' may be. Where one does not say
        # whose it is, what Orbax made of it does.
        files = files or bool(FILES.search(text))
        own = files or isinstance(found, (UserError, OSError))  # may name a file so
        if not own and CARRIERS.search(text):
            return True
        if isinstance(found, jax.errors.JaxRuntimeError) and code not in OWN:
            return True
        if isinstance(found, ValueError) and code in BROKEN and not files:
            return True
    return False


def client() -> Any:
    """JAX's connection to its coordination service; None in a lone process."""
    from jax._src import distributed  # there is no public way to it

    return distributed.global_state.client


@contextlib.contextmanager
def exit_with_peers(silence: float = 60.0, pause: float = 1.0) -> Iterator[None]:
    """Watch over the other processes while the block runs; end with them.

    An error inside ends all of them, this one with status 2 after its message; a
    broken collective is another process's loss. Does nothing in a lone process.

    Args:
      silence: seconds without a sign of life after which a process is lost.
      pause: seconds between signs.
    """
    service, me = client(), jax.process_index()
    if service is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(service, me, silence, pause, done), daemon=True
    )
    thread.start()
    try:
        yield
    except Exception as e:
        if is_loss(e):
            # A collective that broke: another process is gone. Who, the watch says.
            thread.join(silence + 5 * pause)
            _end(" ".join(str(e).split()))
        # This one's own watch must not take the failure it is told of for another's.
        done.set()
        thread.join(5 * pause)
        reason = " ".join(str(e).split()) or type(e).__name__
        if not isinstance(e, (UserError, OSError)):
            traceback.print_exc()
        print(f"gamayun: {reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            service.key_value_set(f"{FAILED}{me}", f"process {me} failed: {reason}")
        time.sleep(3 * pause)  # the others must hear it before the service may end
        os._exit(2)
    except KeyboardInterrupt:
        done.set()
        print("gamayun: interrupted", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            service.key_value_set(f"{FAILED}{me}", f"process {me} was interrupted")
        time.sleep(0 if me else 3 * pause)
        os._exit(130)  # at Python's own exit JAX would wait for the others
    finally:
        done.set()
        thread.join()
    with contextlib.suppress(Exception):
        service.key_value_set(f"{ALIVE}{me}", "done", allow_overwrite=True)


def _watch(
    service: Any, me: int, silence: float, pause: float, done: threading.Event
) -> None:
    heard: dict[str, tuple[str, float]] = {}  # process -> its last sign, when it came
    began, sign, trouble = time.monotonic(), 0, 0
    while not done.wait(pause):
        try:
            sign += 1
            service.key_value_set(f"{ALIVE}{me}", str(sign), allow_overwrite=True)
            failed = dict(service.key_value_dir_get(FAILED))
            signs = service.key_value_dir_get(ALIVE) if me == 0 else []
            trouble = 0
        except Exception as e:  # the service's own kinds
            trouble += 1
            if trouble < 3:
                continue
            _end(f"the first process cannot be reached ({' '.join(str(e).split())})")
        if failed:
            if me == 0:  # its end takes the service: the failed one goes before, with 2
                time.sleep(5 * pause)
            _end(next(iter(failed.values())))
        if me:
            continue
        now = time.monotonic()
        for key, value in signs:
            process = key.rsplit("/", 1)[1]
            if heard.get(process, ("", 0.0))[0] != value:
                heard[process] = (value, now)
        for process in map(str, range(jax.process_count())):
            value, when = heard.get(process, ("", began))
            if value != "done" and now - when > silence:
                reason = f"process {process} was not heard of for {now - when:.0f} s"
                with contextlib.suppress(Exception):
                    service.key_value_set(f"{FAILED}{me}", reason)
                time.sleep(3 * pause)
                _end(reason)


def _end(reason: str) -> None:
    print(
        f"gamayun: {reason[:500]}; all processes stop, start them again to go on from "
        "the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def from_first(value: Any) -> Any:
    """What the first process gives: plain JSON data. Called by all, and no collective:
    processes that were started differently would break one."""
    service = client()
    if service is None:
        return value
    key = next(FIRST)
    if jax.process_index() == 0:
        service.key_value_set(key, json.dumps(value))
        return value
    return json.loads(service.blocking_key_value_get(key, 600_000))  # milliseconds


def gather(value: Any) -> np.ndarray:
    """A number or array of each process, [processes, ...]. Called by all."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    own = np.asarray(value)
    # Whole numbers and truth values as one type: a program for all of them.
    sent = own if own.dtype.kind == "f" else own.astype(np.int32)
    return np.asarray(multihost_utils.process_allgather(sent)).astype(own.dtype)


def check_shared(folder: Path) -> None:
    """Raise UserError unless all see what the first one writes there. Called by all."""
    if jax.process_count() == 1:
        return
    mark, word = folder / ".mark", secrets.token_hex(8)
    first = jax.process_index() == 0
    if first:
        write_text(mark, word)
    word = from_first(word)  # once it is written: on most folders nobody has to wait
    for _ in range(30):
        seen = False
        with contextlib.suppress(OSError):
            seen = mark.read_text("utf-8") == word
        seen_P = gather(seen)
        if seen_P.all():
            break
        time.sleep(1)  # a shared folder may show what is new with a delay
    if first:
        mark.unlink()
    if not seen_P.all():
        raise UserError(
            f"processes {np.flatnonzero(~seen_P).tolist()} do not see what the first "
            f"one writes in {folder}: give all of them a --workdir that they share"
        )


def compare(seconds: dict[str, float]) -> dict[str, Any]:
    """How the processes' seconds differ: name -> most, mean and which has most.

    A straggler has the longest input; the others wait for it. Called by all.
    """
    if jax.process_count() == 1:
        return {}
    names = sorted(seconds)
    all_PN = gather([seconds[n] for n in names])
    return {
        name: {
            "max": float(all_PN[:, k].max()),
            "mean": float(all_PN[:, k].mean()),
            "process": int(all_PN[:, k].argmax()),
        }
        for k, name in enumerate(names)
    }


def barrier(name: str) -> None:
    """Wait for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
