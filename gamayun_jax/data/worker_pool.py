"""Worker processes of a corpus build, and the progress of their jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from gamayun_jax import huge_pages
from gamayun_jax.config import UserError


def start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core's
    # No worker outlives its parent: one that is killed can't tell them to end.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Pool:
    """Runs jobs in spawned processes (never forked: JAX has threads), or right here.

    Args:
      workers: processes (default: the cores of this machine); 1 is this process alone.
      progress: show bars on stderr.
    """

    def __init__(self, workers: int | None = None, progress: bool = False):
        if workers is None:
            workers = len(os.sched_getaffinity(0))
        self.progress = progress
        self._others = set(multiprocessing.active_children())
        self._executor = None
        if workers > 1:
            self._executor = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=start_worker,
            )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._executor is None:
            return
        if kind is not None:
            for child in set(multiprocessing.active_children()) - self._others:
                child.terminate()
        self._executor.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """(number of the job, its result) as they are done."""
        if self._executor is None:
            for i, job in enumerate(jobs):
                yield i, function(*job)
            return
        try:
            # Those that it starts inherit this. Ctrl-C is this process's to handle.
            os.environ.update(huge_pages.changes())
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = {
                    self._executor.submit(function, *job): i
                    for i, job in enumerate(jobs)
                }
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as e:
            raise UserError(
                "a worker process of the build died (out of memory?): run again with "
                "fewer workers, finished shards are kept; in a script of your own, "
                'call build under `if __name__ == "__main__":`'
            ) from e

    def run_all(
        self,
        function: Callable[..., dict[str, Any]],
        jobs: Sequence[tuple[Any, ...]],
        sizes: Sequence[int],
        what: str,
        counted: str,
    ) -> list[dict[str, Any]]:
        """Results in the order of the jobs, under a bar.

        Args:
          sizes: bytes that each job stands for.
          counted: the entry of a result that has its number of documents.
        """
        results: list[dict[str, Any]] = [{}] * len(jobs)
        documents = 0
        with tqdm(
            total=sum(sizes),
            desc=what,
            unit="B",
            unit_scale=True,
            disable=not self.progress,
            file=sys.stderr,
        ) as bar:
            for i, result in self.run(function, jobs):
                results[i] = result
                documents += result[counted]
                bar.set_postfix_str(f"{documents} documents", refresh=False)
                bar.update(sizes[i])
        return results
