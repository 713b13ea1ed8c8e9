"""How long machines have been there, and how long they may be."""

from __future__ import annotations

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
        self.trouble = ""  # why the file has no say; it is then left as it is
        try:
            known = json.loads(self.file.read_text())
            found = float(known["seconds"]), float(known["since"])
            if not all(0 <= x < math.inf for x in found):
                raise ValueError(f"{found}: seconds are finite and at least 0")
            self.seconds, self.since = found
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as e:
            self.trouble = f"cannot be read ({e.strerror}): see to it"
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
            self.trouble = f"is damaged ({e}): restore it"

    def count(self, there: bool) -> None:
        """Count what passed since the last look, at which they were there or not."""
        now = self.now()
        if self.since:
            self.seconds += max(0.0, now - self.since)
        self.since = now if there else 0.0
        if self.launch.dry_run or self.trouble:
            return
        try:
            if there or self.file.exists():
                self.write()
        except OSError as e:  # machines are there, and must be watched on
            say(f"{self.file} cannot be written ({e.strerror}): hours count in memory")

    def write(self) -> None:
        """Write what is counted; a kill leaves the former file or this one whole."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"seconds": self.seconds, "since": self.since}))
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
        """Say what the budget allows, where there is one.

        Raises:
          UserError: it is spent; or what was used is not known, or cannot be kept.
        """
        if self.trouble:
            raise UserError(
                f"{self.file}, which counts the hours of machines, {self.trouble}, or "
                "delete it to count anew"
            )
        if not self.launch.dry_run:
            try:
                self.write()
            except OSError as e:
                raise UserError(
                    f"{self.file} cannot be written ({e.strerror}): give --log-dir a "
                    "folder that can"
                ) from e
        if self.spent:
            raise UserError(
                f"{self.text} of machines are spent already: raise --max-hours or "
                f"--max-cost, or delete {self.file} to count anew"
            )
        allowed = self.launch.budget_hours
        if allowed < math.inf:
            used = f", of which {self.hours:.1f} are used" if self.seconds else ""
            say(f"the budget allows {allowed:.4g} hours of machines{used}")
