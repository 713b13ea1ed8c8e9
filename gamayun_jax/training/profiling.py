"""A trace of some steps of a run, for XProf or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gamayun_jax.config import UserError


class Profile:
    """Traces the steps from `first` to `last`, as the console counts them, into a
    folder. Without steps it does nothing."""

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int] | None,
        log: Callable[[str], None],
    ):
        self._folder, self._steps, self._log = folder, steps, log
        self._active = False

    def check(self, done: int, total: int) -> None:
        """Raise UserError if a run with `done` of `total` steps will not make them."""
        if self._steps is None:
            return
        first, last = self._steps
        if not done < first <= last <= total:
            raise UserError(
                f"--profile {first}:{last}: the run has made {done} of {total} steps: "
                + (f"give some of {done + 1}:{total}" if done < total else "leave it")
            )

    def begin(self, step: int) -> None:
        """Called before step number `step`."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._active = True

    def end(self, step: int, result: Any) -> None:
        """Called after it, with something that the step computes."""
        if self._active and self._steps and step == self._steps[1]:
            jax.block_until_ready(result)
            self.close()
            self._log(
                f"profile of steps {self._steps[0]} to {step}: pip install xprof; "
                f"xprof --logdir {self._folder}"
            )

    def close(self) -> None:
        """End a trace that has begun, whole or not."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
