"""Figures of a benchmark: a line for whoever runs it, a row for `all.py`'s table."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROWS = "BENCHMARK_ROWS"  # environment: the file that rows are added to


def told(values: Sequence[float]) -> str:
    """Median, and (lowest-highest) where there are several."""
    low, high = min(values), max(values)
    middle = figure(statistics.median(values))
    return f"{middle} ({figure(low)}-{figure(high)})" if len(values) > 1 else middle


def figure(value: float) -> str:
    """Three or four digits that count; whole numbers from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def row(name: str, unit: str, values: Sequence[float]) -> None:
    """Print a row of figures and keep it: `values` are of the rounds, in order."""
    print(f"{name:>40}: {told(values)} {unit}", flush=True)
    if path := os.environ.get(ROWS):
        with open(path, "a", encoding="utf-8") as f:
            f.write(
                json.dumps({"name": name, "unit": unit, "values": [*values]}) + "\n"
            )


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """A row of ours over theirs, round by round: what slows down both leaves it."""
    row(name, "times", [a / b for a, b in zip(ours, theirs, strict=True)])


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list]:
    """Seconds of each run, by round; in every round one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare(
    name: str,
    unit: str,
    amount: float,
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
) -> None:
    """Rows of how much of `amount` each run does in a second, in turns, and of the
    first one's over each other one's."""
    spent = in_turns(runs, rounds)
    rates = {who: [amount / s for s in seconds] for who, seconds in spent.items()}
    first, *others = rates
    for who, values in rates.items():
        row(f"{name}: {who}", unit, values)
    for who in others:
        ratio(f"{name}: {first} over {who}", rates[first], rates[who])
