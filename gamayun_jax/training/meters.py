"""What a run measures of its steps: sums of metrics, seconds, steps that waited.

`Meters` belongs to a run and is saved with its checkpoints, so that a resumed run
writes the same records as one that was never interrupted.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

# Overheads: time of a run that is not spent in steps.
OVERHEADS = ("start", "compile", "input", "checkpoint", "evaluate")
# Metric of a step -> name of its sum in checkpoints, whose format is older.
SUMMED = {
    "loss_sum": "numerator",
    "target_count": "denominator",
    "grad_norm": "grad_norm",
    "squared_weights": "squared_weights",
}
STALL_SECONDS = 1e-3  # of waiting for data, which is not yet called a stall


class MetricAccumulator:
    """Sums of the steps since the last record; saved with a checkpoint, so that a
    resumed run writes the same records as one that was never interrupted.

    What a former release's checkpoint lacks counts from there: sums of weights have a
    number of targets of their own.
    """

    def __init__(self, num_languages: int, saved: Mapping[str, Any] | None = None):
        zeros = np.zeros(num_languages)
        self.sums: dict[str, Any] = dict(steps=0, numerator=0.0, denominator=0.0)
        self.sums |= dict(grad_norm=0.0, learning_rate=0.0, skipped=0)
        self.sums |= dict(weighted_targets=0.0, squared_weights=0.0)
        names = ("nll", "targets", "tokens", "weights")
        self.languages = {k: zeros.copy() for k in names}
        if saved is not None:
            self.sums |= saved["sums"]
            self.languages |= {k: np.array(v) for k, v in saved["languages"].items()}

    def add(self, metrics: Mapping[str, Any]) -> None:
        self.sums["steps"] += 1
        for metric, name in SUMMED.items():
            self.sums[name] += float(metrics[metric])
        self.sums["weighted_targets"] += float(metrics["target_count"])
        self.sums["skipped"] += int(metrics["skipped"])
        self.sums["learning_rate"] = float(metrics["learning_rate"])
        for name, values in metrics["languages"].items():
            self.languages[name] += np.asarray(values, np.float64)

    def to_json(self) -> dict[str, Any]:
        languages = {k: v.tolist() for k, v in self.languages.items()}
        return {"sums": self.sums, "languages": languages}

    def record(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Means of the interval, overall and per language (null without targets).

        `objective` has what the token weights did, as sums that add up over records:
        the number of targets, their weights' sum W and sum of squares S; and the
        effective sample size W^2 / S (Kish 1965), as a share of the targets. A
        language's share of the objective is its `weight` over W.
        """
        s, by = self.sums, self.languages
        weight = float(by["weights"].sum())
        most = s["squared_weights"] * s["weighted_targets"]  # W^2, were weights equal

        def mean(total: float, count: float) -> float | None:
            value = total / count if count else math.nan
            return value if math.isfinite(value) else None

        return {
            "loss": mean(s["numerator"], s["denominator"]),
            "nll": mean(by["nll"].sum(), by["targets"].sum()),
            "lr": s["learning_rate"],
            "grad_norm": mean(s["grad_norm"], s["steps"] - s["skipped"]),
            "skipped": s["skipped"],
            "objective": {
                "targets": int(s["weighted_targets"]),
                "weight": weight,
                "squared_weights": s["squared_weights"],
                "effective_share": mean(weight * weight, most),
            },
            "languages": {
                name: {
                    "nll": mean(by["nll"][k], by["targets"][k]),
                    "targets": int(by["targets"][k]),
                    "tokens": int(by["tokens"][k]),
                    "weight": float(by["weights"][k]),
                }
                for k, name in enumerate(names)
            },
        }


class GoodputTimer:
    """Where the time goes: seconds by activity, since the last `lap` and in the run.

    Saved with a checkpoint, so that what a run lost by an interruption is what no
    clock has counted.
    """

    def __init__(self, began: float, saved: Mapping[str, Any] | None = None) -> None:
        """`began`: of this process, by time.perf_counter(); `saved`: by to_json."""
        self._total: dict[str, float] = dict(saved["total"]) if saved else {}
        self._lap: dict[str, float] = dict(saved["lap"]) if saved else {}
        self._start = began

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that an activity took."""
        for sums in (self._lap, self._total):
            sums[name] = sums.get(name, 0.0) + seconds

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - begin)

    def _tick(self) -> None:
        now = time.perf_counter()
        self.add("seconds", now - self._start)
        self._start = now

    def lap(self) -> dict[str, float]:
        """seconds, and activity_s of each activity, since the last call."""
        self._tick()
        lap, self._lap = self._lap, {}
        return {f"{k}_s" if k != "seconds" else k: v for k, v in lap.items()}

    def to_json(self) -> dict[str, Any]:
        self._tick()
        return {"lap": dict(self._lap), "total": dict(self._total)}

    def leave_out_rest(self, started: str, wall: float) -> None:
        """Leave out of the wall time that the run was complete before it got more
        steps.

        Args:
          started: as for `goodput`.
          wall: of its last goodput, when it was complete.
        """
        here = time.perf_counter() - self._start  # this process is no rest
        self._total["complete"] = max(seconds_since(started) - here - wall, 0.0)

    def goodput(self, started: str) -> dict[str, float]:
        """Seconds of the run's wall time by what they went to.

        Args:
          started: when the run began (ISO 8601); unreadable: when its first clock did.

        Returns:
          wall; productive (the steps themselves); start (of each process), compile,
          input (waiting for data), checkpoint (the part that steps wait for),
          evaluate; and interrupted: away, or making steps again.
        """
        self._tick()
        counted = self._total["seconds"]
        wall = max(seconds_since(started) - self._total.get("complete", 0.0), counted)
        lost = {name: self._total.get(name, 0.0) for name in OVERHEADS}
        lost["interrupted"] = wall - counted
        return {"wall": wall, "productive": wall - sum(lost.values()), **lost}


def seconds_since(started: str) -> float:
    """Seconds since a time (ISO 8601); below any where it is unreadable."""
    try:
        return time.time() - datetime.datetime.fromisoformat(started).timestamp()
    except (TypeError, ValueError, OverflowError):
        return -math.inf


def goodput_text(seconds: Mapping[str, float]) -> str:
    """ "goodput 83.1 % of 0:02:10: compile 6.1 s, evaluate 12.0 s"."""
    wall = max(seconds["wall"], 1e-9)
    parts = [
        f"{name} {value:.1f} s"
        for name, value in seconds.items()
        if name not in ("wall", "productive") and value >= 0.05
    ]
    whole = datetime.timedelta(seconds=round(wall))
    share = seconds["productive"] / wall
    return f"goodput {share:.1%} of {whole}" + (
        f": {', '.join(parts)}" if parts else ""
    )


class Meters:
    """The meters of a run, and the metrics of steps that the host has not read yet."""

    def __init__(
        self,
        num_languages: int,
        began: float,
        sums: Mapping[str, Any] | None = None,
        times: Mapping[str, Any] | None = None,
    ):
        """`began`: of this process, by time.perf_counter(); `sums`, `times`: what a
        checkpoint has of the accumulator and the timer."""
        self._num_languages = num_languages
        self.accumulator = MetricAccumulator(num_languages, sums)
        self.timer = GoodputTimer(began, times)
        self.in_flight: list[tuple[int, dict[str, Any]]] = []  # (step, metrics)
        self.stalls = 0  # steps since the last record before which the device ran dry

    def timed_next(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time that it takes is counted as input."""
        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        self.timer.add("input", waited)
        # The step before is done: the device waits too.
        idle = bool(self.in_flight) and self.in_flight[-1][1]["loss_sum"].is_ready()
        self.stalls += idle and waited > STALL_SECONDS
        return batch

    def push(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step that was dispatched to the devices."""
        self.in_flight.append((step, metrics))

    def begin_record(self) -> None:
        """Begin the sums of the next record."""
        self.accumulator, self.stalls = MetricAccumulator(self._num_languages), 0
