"""Results whose intervals come from resampling rows: means of a value a row, and values of all rows together.

Intervals are percentile bootstraps (Efron 1979) that draw whole rows, since what belongs to one row (tokens, n-grams)
is not independent. Draws are seeded, and the same rows are drawn for both models of a difference.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.training.intervals import Interval, proportion

RESAMPLES = 2000
BOUNDS = (0.025, 0.975)


class Pooled(ABC):
    """A value computed from numbers that are summed over the rows, such as losses and tokens, or matched n-grams."""

    @property
    def unit(self) -> str:
        return ""

    @property
    def better(self) -> str:
        return "higher"

    @abstractmethod
    def counts(self) -> Any:
        """Return what is summed, one line a row: [rows, counts]."""

    @abstractmethod
    def statistic(self, sums_SK: Any) -> Any:
        """Compute the value of each line of summed counts."""

    def shown(self, statistic: Any) -> Any:
        """Transform the statistic into the value that is shown, rising with it."""
        return statistic

    @property
    def value(self) -> float:
        """The value alone, which takes no resamples."""
        return float(self.shown(self._whole()))

    @property
    def interval(self) -> Interval:
        low, high = np.quantile(self._resampled(), BOUNDS)
        return Interval(*(float(self.shown(x)) for x in (self._whole(), low, high)))

    def difference(self, base: Any) -> Interval:
        with np.errstate(invalid="ignore"):
            apart = self.shown(self._resampled()) - base.shown(base._resampled())
            value = self.shown(self._whole()) - base.shown(base._whole())
        low, high = np.quantile(apart, BOUNDS)
        return Interval(float(value), float(low), float(high))

    def _whole(self) -> Any:
        return self.statistic(np.asarray(self.counts(), dtype=np.float64).sum(axis=0)[None])[0]

    def _resampled(self) -> Any:
        """Compute the statistic of many resamples of the rows; as many rows get the same resamples."""
        counts_RK = np.asarray(self.counts(), dtype=np.float64)
        rows, draw = len(counts_RK), np.random.default_rng(0)
        # One resample at a time: all at once would hold RESAMPLES x rows numbers.
        sums = [np.bincount(draw.integers(rows, size=rows), minlength=rows) @ counts_RK for _ in range(RESAMPLES)]
        return self.statistic(np.asarray(sums))


@dataclass(frozen=True)
class RowMean(Pooled):
    """The mean of a value a row.

    Attributes:
        values: Value of each row.
        unit, better: properties of a `MetricResult`.
    """

    values: Sequence[float]
    unit: str = ""
    better: str = "higher"

    def counts(self) -> Any:
        return np.stack([np.asarray(self.values, dtype=np.float64), np.ones(len(self.values))], axis=1)

    def statistic(self, sums_SK: Any) -> Any:
        return sums_SK[:, 0] / sums_SK[:, 1]


class PooledShares(Pooled):
    """A share of parts of rows; where it is 0 or 1 no resample differs, and the rows that have parts are counted."""

    @property
    def unit(self) -> str:
        return "share"

    @property
    def interval(self) -> Interval:
        value = self.value
        if value not in (0.0, 1.0):
            return super().interval
        rows = int((np.asarray(self.counts())[:, 1:].sum(axis=1) > 0).sum())
        return proportion(round(value * rows), rows) if rows else Interval(value, 0.0, 1.0)


@dataclass(frozen=True)
class PooledShare(PooledShares):
    """The share of all parts of all rows of which something is true, such as words that are tagged rightly.

    Attributes:
        hits, parts: number of those parts, and of all, of each row.
    """

    hits: Sequence[int]
    parts: Sequence[int]

    def counts(self) -> Any:
        return np.stack([self.hits, self.parts], axis=1).astype(np.float64)

    def statistic(self, sums_SK: Any) -> Any:
        return sums_SK[:, 0] / sums_SK[:, 1]
