"""Figures of a benchmark: a line for whoever runs it, a row for `all.py`'s table."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence

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
