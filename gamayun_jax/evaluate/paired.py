"""Two evaluations of the same items: what they differ by, and whether it is chance.

The one rule of every page and table. Under the null hypothesis the two could change
places on every item, so that each difference could as well have the other sign
(Fisher, 1935). The p value is the share of all such signs that give as large a sum:

- exact where at most FEW items changed, and for any number where all changed by the
  same amount, as right and wrong answers do: then it is the sign test (McNemar's exact
  test, the binomial one);
- else by Student's t of the differences, which has no least value: one strong effect
  stays visible among thousands of cells.

The 95 % interval is by Student's t, of the linearised ratio of sums for bits per byte
(evaluate.ratio). It holds 0 if and only if p is above 5 %, and is for one cell alone;
what is marked is what stays significant over all cells of a comparison (Holm, 1979).
Where there is nothing to tell an error from (one item, or none that changed), there is
no interval and no mark.

Shape suffixes: I items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

LEVEL = 0.05
FEW = 16  # 2 ** FEW signs are tried
MACRO = "macro"


@dataclass(frozen=True)
class Estimate:
    """What a language, or the mean of languages, differs by."""

    value: float
    low: float | None = None  # of the 95 % interval; None: no error is known
    high: float | None = None
    p: float = 1.0  # two-sided
    items: int | None = None


def residuals(
    values: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of sum(values) / sum(sizes): the items' parts, float64 [I], that sum up to it;
    those whose squares sum up to its variance, NaN for one item; and what that lacks.

    Items that all changed by the same amount tell little of how many change: as much
    is added as one more for and one more against (Bonett & Price, 2012).
    """
    total, n = sizes.sum(), len(values)
    error = math.sqrt(n / (n - 1)) if n > 1 else math.nan
    changed = np.abs(values[values != 0])
    extra = 2 * (changed[0] / total) ** 2 if len(changed) and alike(changed) else 0.0
    return (
        values / total,
        error * (values - values.sum() / total * sizes) / total,
        float(extra),
    )


def alike(sizes: np.ndarray) -> bool:
    """Whether positive numbers are all the same."""
    return bool(np.ptp(sizes) <= 1e-9 * sizes.max())


def sign_test(parts: np.ndarray) -> float | None:
    """Exact share of all signs whose sum is as far from 0; None: too many to try."""
    changed = np.abs(parts[parts != 0])
    n = len(changed)
    if not n:
        return 1.0
    if alike(changed):
        up = int((parts > 0).sum())
        return min(1.0, 2 * float(special.bdtr(min(up, n - up), n, 0.5)))
    if n > FEW:
        return None
    sums = np.zeros(1)
    for x in changed:
        sums = np.concatenate([sums + x, sums - x])
    least = abs(parts.sum()) - 1e-9 * changed.sum()
    return float((np.abs(sums) >= least).mean())


def estimate(
    parts: np.ndarray, variance: float, degrees: float, items: int | None = None
) -> Estimate:
    """The rule (see the module) on independent parts of a difference."""
    difference = float(parts.sum())
    size = np.abs(parts)
    parts = np.where(size > 1e-9 * size.max(), parts, 0.0)  # what rounding left
    if not (degrees > 0 and parts.any() and variance >= 0):
        return Estimate(difference, items=items)
    low, high, by_error = by_t(difference, math.sqrt(variance), degrees)
    p = sign_test(parts)
    if p is None:
        p = by_error
    elif p > LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    elif low <= 0 <= high:
        p = max(p, by_error)
    return Estimate(difference, low, high, p, items)


def by_t(difference: float, error: float, degrees: float) -> tuple[float, float, float]:
    """Ends of the 95 % interval, and the two-sided p, of a difference by Student's t.

    Args:
      error: the difference's standard error, with so many degrees of freedom.
    """
    half = float(special.stdtrit(degrees, 1 - LEVEL / 2)) * error
    t = -abs(difference) / error if error else -math.inf if difference else 0.0
    p = min(1.0, 2 * float(special.stdtr(degrees, t)))
    return difference - half, difference + half, p


def estimates(
    languages: Mapping[str, Mapping[str, tuple[float, float]]], parallel: bool
) -> dict[str, Estimate]:
    """Language -> what it differs by, and MACRO, the mean over languages.

    Args:
      languages: language -> id -> (difference, weight); languages without items are
        left out.
      parallel: items of one id are the same in all languages, so that their errors go
        together.
    """
    found: dict[str, Estimate] = {}
    sums: dict[Any, np.ndarray] = {}  # independent items of the mean
    extras, variances, degrees = [], [], []
    known = {k: v for k, v in languages.items() if sum(w for _, w in v.values()) > 0}
    for language, items in known.items():
        values, sizes = np.array(list(items.values()), np.float64).T
        parts, errors, extra = residuals(values, sizes)
        variance = float((errors**2).sum()) + extra
        found[language] = estimate(parts, variance, len(items) - 1, len(items))
        extras.append(extra)
        variances.append(variance)
        degrees.append(len(items) - 1)
        for i, part in zip(items, np.stack([parts, errors], -1), strict=True):
            key = i if parallel else (language, i)
            sums[key] = sums.get(key, 0.0) + part / len(known)
    if known:
        parts, errors = np.array(list(sums.values())).T
        n = len(known)
        if parallel:
            variance = (errors**2).sum() + (np.sqrt(extras).sum() / n) ** 2
            free = len(sums) - 1.0
        else:
            variance = sum(variances) / n**2
            # Welch & Satterthwaite: of a sum of variances.
            each = zip(variances, degrees, strict=True)
            below = sum((v / n**2) ** 2 / max(d, 1) for v, d in each)
            free = variance**2 / below if below > 0 else float(sum(degrees))
        found[MACRO] = estimate(parts, float(variance), free)
    return found


def unpaired(difference: float, *errors: float | None) -> Estimate:
    """Of two values whose items are not at hand: their standard errors are added as if
    the items differed, which is cautious. An error of 0 is one of too few items."""
    known = [e for e in errors if e is not None]
    error = math.hypot(*known)
    if len(known) < len(errors) or not error:
        return Estimate(difference)
    half = float(special.ndtri(1 - LEVEL / 2)) * error
    p = 2 * float(special.ndtr(-abs(difference) / error))
    return Estimate(difference, difference - half, difference + half, p)


def above_baseline(
    share: float, error: float | None, baseline: float, items: float
) -> Estimate:
    """A share of right answers against one that is known without error.

    Its error is at least that of the baseline's own share, and half an item is taken
    off (Yates, 1934): two of two right are not certain.
    """
    if error is None:
        return Estimate(share - baseline)
    error = max(error, math.sqrt(max(baseline * (1 - baseline), 0.0) / items))
    gain = max(abs(share - baseline) - 0.5 / items, 0.0)
    return unpaired(math.copysign(gain, share - baseline), error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: the chance that any of those up to LEVEL falls falsely is at
    most LEVEL (Holm)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, least = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def verdicts(found: Sequence[Estimate], better: Sequence[int]) -> list[str]:
    """better | worse | same of each cell of a whole comparison (Holm).

    Args:
      better: 1 where more is better, -1 where less is.
    """
    adjusted = holm([c.p for c in found])
    return [
        "same" if p > LEVEL else "better" if sign * c.value > 0 else "worse"
        for c, sign, p in zip(found, better, adjusted, strict=True)
    ]
