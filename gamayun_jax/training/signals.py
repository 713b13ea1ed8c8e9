"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """SIGTERM and SIGINT ask for a stop after this step; a second one stops at once.

    A thread of its own says so: Python's handlers wait while the compiler runs. With
    several processes SIGTERM goes to JAX's preemption service, which lets all of them
    stop after the same step whichever got it; SIGINT is passed on as one. Outside of
    the main thread, where Python takes no handlers, signals are left alone.
    """

    PATIENCE = 2.0  # seconds that the main thread has to hear of a second signal

    def __init__(self, log: Callable[[str], None], own_process: bool = True):
        """`own_process`: whether a second signal may end the process where the main
        thread does not hear of it; a notebook's kernel is not ours to end."""
        self._log, self._own_process = log, own_process
        self.requested = False
        self._alone = jax.process_count() == 1
        self._former: dict[int, Any] = {}
        self._handled = self._received = 0
        self._leaving = threading.Event()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._write.fileno())
        signals = [signal.SIGINT, *([signal.SIGTERM] if self._alone else [])]
        self._former = {s: signal.signal(s, self._handle) for s in signals}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after step number `step`."""
        if self._alone:
            return self.requested
        return multihost_utils.reached_preemption_sync_point(step)

    def _listen(self) -> None:
        while numbers := self._read.recv(16):
            for _ in filter(self._former.__contains__, numbers):
                self._received += 1
                if self._received == 1:
                    self._log("stopping: saving after this step; again to quit now")
                    if not self._alone:
                        os.kill(os.getpid(), signal.SIGTERM)
                elif not self._leaving.wait(self.PATIENCE) and self._own_process:
                    print("gamayun: interrupted", file=sys.stderr, flush=True)
                    os._exit(130)

    def _handle(self, number: int, frame: Any) -> None:
        self._handled += 1
        if self._leaving.is_set():  # once is enough: `__exit__` runs to its end
            return
        # Two of the same number are one to Python while the compiler runs.
        if max(self._handled, self._received) > 1:
            self._leaving.set()
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error: object) -> None:
        if not self._former:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        self._write.close()
        self._thread.join()
        self._read.close()
