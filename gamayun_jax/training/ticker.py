"""Something that is done again and again while other work goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def ticker(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """Call a function every so many seconds, in a thread, while the block runs.

    When the block ends, no call is under way and none comes any more.
    """
    done = threading.Event()

    def tick() -> None:
        while not done.wait(seconds):
            call()

    thread = threading.Thread(target=tick, name="ticker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
