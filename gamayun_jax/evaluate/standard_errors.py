"""Means and ratios of sums over a sample of items, with their standard errors.

Shape suffixes: U units (items, texts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_se(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; none for a single value."""
    x = np.array(values, np.float64)
    if len(x) < 2:
        return float(x.mean()), None
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent values; None if one has none."""
    known = [e for e in errors if e is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def ratio_residuals(values_U: np.ndarray, sizes_U: np.ndarray) -> np.ndarray:
    """What each unit adds to the error of sum(values) / sum(sizes), float64 [U].

    Linearisation of the ratio estimator (Cochran, Sampling Techniques, 1977, 6.3).
    """
    r = values_U.sum() / sizes_U.sum()
    n = len(values_U)
    return math.sqrt(n / max(n - 1, 1)) * (values_U - r * sizes_U) / sizes_U.sum()


def root(residuals: np.ndarray) -> float:
    """The standard error of a sum whose independent parts have these residuals."""
    return float(math.sqrt((residuals**2).sum()))


def ratio(values_U: np.ndarray, sizes_U: np.ndarray) -> tuple[float, float | None]:
    """sum(values) / sum(sizes) and its standard error over units; none for one."""
    residuals = ratio_residuals(values_U, sizes_U)
    error = None if len(values_U) < 2 else root(residuals)
    return float(values_U.sum() / sizes_U.sum()), error


def pooled_ratio(
    values: Sequence[np.ndarray], sizes: Sequence[np.ndarray]
) -> tuple[float, float | None]:
    """`ratio` over independent strata, e.g. languages, each a sample of units.

    How strata differ from each other is no sampling error, so residuals are centred
    within each (combined ratio estimator, Cochran 1977, 6.11).
    """
    total = sum(float(s.sum()) for s in sizes)
    r = sum(float(v.sum()) for v in values) / total
    variance = 0.0
    for v, s in zip(values, sizes, strict=True):
        residual, n = v - r * s, len(v)
        variance += n / max(n - 1, 1) * ((residual - residual.mean()) ** 2).sum()
    known = min(map(len, values)) > 1  # of one unit nothing tells an error
    return r, math.sqrt(variance) / total if known else None


def compression(bits_U: np.ndarray, bytes_U: np.ndarray) -> dict[str, float | None]:
    """Results of texts that were scored whole: bits, bits per byte and per unit."""
    value, error = ratio(bits_U, bytes_U)
    return {
        "bytes": int(bytes_U.sum()),
        "bits": float(bits_U.sum()),
        "bits_per_byte": value,
        "bits_per_byte_se": error,
        "bits_per_unit": float(bits_U.mean()),
    }
