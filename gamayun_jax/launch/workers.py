"""What the workers' trainers do, one by one and together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a worker says of its trainer, as `scripts.LOOK` prints it."""

    state: str  # running, exit, stopped, dead, none
    status: int
    checksum: str  # of the trainer's arguments
    host: str


def read_workers(text: str) -> list[Worker]:
    """The workers' lines of what they all print."""
    found = re.findall(r"^gamayun-worker (\w+) (\d+) (\S+) (\S*)", text, re.M)
    return [Worker(state, int(code), total, host) for state, code, total, host in found]


def judge(workers: Sequence[Worker], sums: Sequence[str]) -> str:
    """What all workers together do.

    Args:
      sums: checksums of the arguments that a trainer of this launch may have.

    Returns:
      done, bad (input), stopped, idle, running, ending (some are through), broken,
      other (arguments), or unreachable.
    """
    ends = [(w.state, w.status) for w in workers]
    if not ends:
        return "unreachable"
    if ("exit", 2) in ends:
        return "bad"
    if all(end == ("exit", 0) for end in ends):
        return "done"
    if all(state == "stopped" for state, _ in ends):
        return "stopped"
    if all(state == "none" for state, _ in ends):
        return "idle"
    if any(state in ("dead", "none", "exit") for state, _ in ends):
        # Worker 0 may still write what is written once when the others are through.
        fine = {("running", 0), ("exit", 0), ("exit", 3)}
        return "ending" if ("running", 0) in ends and set(ends) <= fine else "broken"
    return "running" if all(w.checksum in sums for w in workers) else "other"
