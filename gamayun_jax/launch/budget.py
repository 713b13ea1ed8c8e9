"""How long machines have been there, and how long they may be."""

from __future__ import annotations

import contextlib
import json
import math
import time

from gamayun_jax.fields import UserError
from gamayun_jax.launch.description import Launch
from gamayun_jax.launch.tools import say


class Budget:
    """Hours of machines that are there, over all restarts, kept in the log folder.

    What passes between two looks is counted where the machines were there at the first:
    a launcher that was away counts too much rather than too little.
    """

    def __init__(self, launch: Launch, now=time.time):
        self.launch, self.now = launch, now
        self.file = launch.logs / "machine_seconds.json"
        self.seconds, self.since = 0.0, 0.0  # since when they are there; 0: they aren't
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(self.file.read_text())
            self.seconds, self.since = known["seconds"], known["since"]

    def count(self, there: bool) -> None:
        """Count what passed since the last look, at which they were there or not."""
        now = self.now()
        if self.since:
            self.seconds += max(0.0, now - self.since)
        self.since = now if there else 0.0
        if not self.launch.dry_run and (there or self.file.exists()):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            known = {"seconds": self.seconds, "since": self.since}
            new = self.file.with_suffix(".new")  # a kill leaves one of them whole
            new.write_text(json.dumps(known))
            new.replace(self.file)

    @property
    def hours(self) -> float:
        """Of machines, until the last look."""
        return self.seconds / 3600

    @property
    def spent(self) -> bool:
        """Whether the hours are over."""
        return self.hours >= self.launch.budget_hours

    @property
    def text(self) -> str:
        """ "101.2 of 100 hours": what was used of what is allowed."""
        return f"{self.hours:.1f} of {self.launch.budget_hours:.4g} hours"

    def announce(self) -> None:
        """Say what the budget allows, where there is one; UserError if it is spent."""
        if self.spent:
            raise UserError(
                f"{self.text} of machines are spent already: raise --max-hours or "
                f"--max-cost, or delete {self.file} to count anew"
            )
        allowed = self.launch.budget_hours
        if allowed < math.inf:
            used = f", of which {self.hours:.1f} are used" if self.seconds else ""
            say(f"the budget allows {allowed:.4g} hours of machines{used}")
