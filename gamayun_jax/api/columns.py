"""Records as columns: what a notebook plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


class Columns(dict[str, np.ndarray]):
    """Column -> NumPy array; all of one length. A number that is missing is NaN.

    Example:
      >>> run.history["step"], run.history["nll/ru"].shape
      (array([ 4,  7, 11, 13]), (4,))
    """

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Columns:
        """The values of these names in rows; None where a row has none."""
        rows = list(rows)
        return cls({name: column([row.get(name) for row in rows]) for name in names})

    def to_pandas(self) -> Any:
        """The same as a pandas.DataFrame; ImportError where pandas is not installed."""
        import pandas

        return pandas.DataFrame(dict(self))

    def __repr__(self) -> str:
        rows = len(next(iter(self.values()), ()))
        names = list(self)
        more = f" and {len(names) - 9} more" if len(names) > 9 else ""
        return f"<{rows} rows of {', '.join(names[:9])}{more}>"


def column(values: Sequence[Any]) -> np.ndarray:
    """Whole numbers, numbers with NaN for what is none, or objects as they are."""
    if any(isinstance(v, str) for v in values):
        return np.array(["" if v is None else v for v in values])
    if all(isinstance(v, int) for v in values):
        return np.array(values, np.int64)
    return np.array([np.nan if v is None else v for v in values], np.float64)
