"""Values as people read them, each one printable line of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gamayun_jax.evaluate.paired import Estimate


def plain(value: Any, limit: int = 60) -> str:
    """Any value as one printable line of at most `limit` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def short(value: float | None) -> str:
    """1234567 -> "1.23M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value is not None and abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return "–" if value is None else f"{value:.3g}"


def fixed(value: float | None, form: str = ".3f") -> str:
    """A number in Python's format, with a true minus; "–" for None."""
    return "–" if value is None else format(value, form).replace("-", "−")


def metric_name(metric: Any) -> str:
    """What tables call a metric: "bits per byte", "accuracy (norm)"."""
    name = plain(metric, 24)
    accuracies = ("raw", "token", "norm", "pmi")
    return f"accuracy ({name})" if name in accuracies else name.replace("_", " ")


def metric_text(task: Mapping[str, Any], value: float | None) -> str:
    """A value of a task's headline metric: "41.5 %", or "1.234" bits per byte."""
    if value is None:
        return ""
    return f"{value:.3f}" if task["kind"] == "perplexity" else f"{100 * value:.1f} %"


def error_text(task: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """ "±1.2 %", the standard error of a row's headline metric; "" where none is known.

    Items that are all right, or all wrong, have a spread of 0, which tells no error.
    """
    error = row.get(f"{task['metric']}_se")
    return f"±{metric_text(task, error)}" if error else ""


def interval_text(estimate: Estimate, scale: float = 1.0, digits: int = 3) -> str:
    """ "−0.010 … +0.004": with as many digits as show on which side of 0 it is."""
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return "–"
    if low * high > 0:
        near = min(abs(low), abs(high)) * scale
        while digits < 9 and round(near, digits) == 0:
            digits += 1
    return " … ".join(fixed(scale * x, f"+.{digits}f") for x in (low, high))
