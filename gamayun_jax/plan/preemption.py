"""Preemptions: what spot VMs do to a run's days and cost, and how often to save.

Preemptions come by chance and without memory (a Poisson process), without notice: what
was not saved is made again. A simulation, because new VMs take time that is not paid
for, and because the spread matters as much as the mean; the formulas stand beside it:
Young 1974 (doi:10.1145/361147.361115) and Daly 2006 (doi:10.1016/j.future.2004.11.016).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gamayun_jax.config import UserError
from gamayun_jax.fields import check_there

DAY = 86_400.0
RUNS, SEED = 1000, 0
FAR = 3.0  # times the least expected time: intervals that are not simulated
MOST = 1e5  # expected preemptions beyond which a run is called hopeless


@dataclass(frozen=True)
class Preemptions:
    """What spot VMs cost a run in time."""

    per_day: float  # of the run: any slice's ends it
    restart: float = 600.0  # seconds from VMs that are there to the first step
    save: float = 30.0  # seconds that steps wait for a checkpoint
    queue: float = 0.0  # mean seconds until new VMs are there; not paid for


def young(p: Preemptions) -> float:
    """Seconds of work between checkpoints: Young's first-order optimum."""
    return math.sqrt(2.0 * p.save * DAY / p.per_day)


def daly(p: Preemptions) -> float:
    """Seconds of work between checkpoints: Daly's higher-order optimum."""
    mean = DAY / p.per_day
    if p.save >= 2.0 * mean:
        return mean
    ratio = p.save / (2.0 * mean)
    series = 1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0
    return math.sqrt(2.0 * p.save * mean) * series - p.save


def expected_uptime(work: float, interval: float, p: Preemptions) -> float:
    """Daly's expectation (his equation 20): seconds on VMs for seconds of work."""
    mean = DAY / p.per_day
    exponent = (interval + p.save) / mean
    if exponent + p.restart / mean > 500.0:
        return math.inf
    cycles = work / interval
    return mean * math.exp(p.restart / mean) * math.expm1(exponent) * cycles


def simulate(
    work: float,
    intervals: ArrayLike,
    p: Preemptions,
    runs: int = RUNS,
    seed: int = SEED,
) -> dict[str, NDArray[np.float64]]:
    """Runs to their end, for each interval the same preemptions.

    Args:
      work: seconds of steps.
      intervals: seconds of steps between checkpoints, of shape (n,).

    Returns:
      `wall`, `uptime` (seconds, with and without the time without VMs) and
      `preemptions`, each of shape (n, runs).
    """
    rng = np.random.default_rng(seed)
    tau = np.asarray(intervals, float)[:, None]
    left = np.full((len(tau), runs), float(work))
    wall, uptime, preemptions = np.zeros((3, *left.shape))
    going = left > 0
    while going.any():
        until = rng.exponential(DAY / p.per_day, runs)
        wait = rng.exponential(p.queue, runs)
        needed = p.restart + left + p.save * np.ceil(left / tau)
        through = until >= needed
        used = np.where(through, needed, until)
        uptime += np.where(going, used, 0.0)
        wall += np.where(going, used + wait, 0.0)
        preemptions += going & ~through
        saved = np.floor(np.maximum(until - p.restart, 0.0) / (tau + p.save)) * tau
        left -= np.where(going & ~through, np.minimum(saved, left), 0.0)
        going &= ~through
    return {"wall": wall, "uptime": uptime, "preemptions": preemptions}


def on_spot(plan: Mapping[str, Any], p: Preemptions, own: int) -> dict[str, Any]:
    """What a plan becomes on spot VMs: days, chip-hours, and when to save.

    Args:
      plan: by `plan_topology`.
      own: `checkpoint.every_steps` of the config.

    Raises:
      UserError: so many preemptions that the run would hardly get on.
    """
    step, work = plan["seconds"]["step"], plan["days"] * DAY
    guess = min(max(daly(p), step), work)
    grid = guess * np.geomspace(0.1, 10.0, 41)
    grid = np.unique(np.clip(np.round(grid / step), 1, math.ceil(work / step))) * step
    limit = MOST * DAY / p.per_day
    expected = np.array([expected_uptime(work, tau, p) for tau in grid])
    # Those far from the best would take most of the simulation's time.
    grid = grid[expected < min(limit, FAR * expected.min())]
    if not len(grid):
        raise UserError(
            f"--spot {p.per_day:g} preemptions a day and {p.restart:g} s for each "
            "restart leave hardly any time for steps: take fewer chips, a shorter "
            "--restart, or VMs that stay"
        )
    found = simulate(work, grid, p)
    best = int(found["uptime"].mean(1).argmin())
    kept = {k: found[k][best] for k in found}
    hours = kept["uptime"].mean() / 3600 * plan["chips"]
    ratio = plan["cost"] / plan["chip_hours"] if plan["cost"] is not None else None
    told = {
        "per_day": p.per_day,
        "restart": p.restart,
        "save": p.save,
        "queue": p.queue,
        "runs": RUNS,
        "seed": SEED,
        "every_steps": round(grid[best] / step),
        "interval": float(grid[best]),
        "young": young(p),
        "daly": daly(p),
        "days": float(kept["wall"].mean() / DAY),
        "days_10_90": (np.quantile(kept["wall"], (0.1, 0.9)) / DAY).tolist(),
        "preemptions": float(kept["preemptions"].mean()),
        "goodput": work / float(kept["wall"].mean()),
        "chip_hours": float(hours),
        "cost": None if ratio is None else float(hours * ratio),
        "formula_days": expected_uptime(work, grid[best], p) / DAY,
        "own_every_steps": own,
        "own_days": None,
    }
    if expected_uptime(work, own * step, p) < limit:
        mine = simulate(work, [min(own * step, work)], p)
        told["own_days"] = float(mine["wall"].mean() / DAY)
    return told


def measured_times(run: Path) -> tuple[float, float]:
    """Seconds of a restart and of a save that a former run took, by its own records.

    Raises:
      UserError: `run` has none.
    """
    check_there(run, "--measured ", "name a run folder")
    try:
        spent = json.loads((run / "goodput.json").read_text())
        lineage = json.loads((run / "lineage.json").read_text())
        starts = 1 + sum(e["event"] == "resumed" for e in lineage["events"])
        saves = max(1, len(lineage["checkpoints"]))
        return (spent["start"] + spent["compile"]) / starts, spent["checkpoint"] / saves
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"--measured {run}: there is no record of a run's time ({e}): name a run "
            "folder"
        ) from e
