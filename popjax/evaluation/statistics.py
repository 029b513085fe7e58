"""Means with standard errors, alone and paired with dense, of independent items of equal worth.

A mean over windows of different lengths is a ratio of sums: its error is that of the ratio.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over n items and its standard error, NaN for fewer than two."""

    mean: float
    standard_error: float
    n: int

    def words(self, digits: int = 3, sign: bool = False) -> str:
        """`0.512 ± 0.014`."""
        form = f"{'+' if sign else ''}.{digits}f"
        error = "-" if math.isnan(self.standard_error) else f"{self.standard_error:.{digits}f}"
        return f"{self.mean:{form}} ± {error}"

    def to_json(self) -> dict[str, float | int | None]:
        """Plain values; an error that there is not is null, which JSON has and NaN it has not."""
        error = None if math.isnan(self.standard_error) else self.standard_error
        return {"mean": self.mean, "standard_error": error, "n": self.n}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of independent values."""
    return Mean(float(np.mean(values, dtype=np.float64)), standard_error(values), len(values))


def paired(values: Sequence[float], others: Sequence[float]) -> Mean:
    """The mean difference of values that belong together pair by pair."""
    return mean_of([a - b for a, b in zip(values, others, strict=True)])


def ratio(sums: Sequence[float], weights: Sequence[float]) -> Mean:
    """sum(sums) / sum(weights) over independent items, with the ratio's linearised error.

    With equal weights it is the mean of sums / weights and that mean's error.
    """
    n, whole = len(sums), math.fsum(weights)
    found = math.fsum(sums) / whole
    if n < 2:
        return Mean(found, math.nan, n)
    left = [s - found * w for s, w in zip(sums, weights, strict=True)]
    spread = math.sqrt(math.fsum(x * x for x in left) * n / (n - 1))
    return Mean(found, spread / whole, n)


__all__ = ["Mean", "mean_of", "paired", "ratio", "standard_error"]
