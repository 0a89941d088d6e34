"""Paired comparison of two models on the same rows: which answers changed, and whether the difference is significant.

The same rows are hard for both models, so what counts is where they differ (McNemar 1947): rows that one has right and
the other wrong. The interval of the difference is Tango's score interval for paired proportions (1998), which inverts
McNemar's test, and holds for few rows and for differences of zero, where the usual normal interval has no width at all.
bench/judge.py measures how often it covers the truth; of the intervals compared (docs/LOG.md) it came nearest to 95%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.training.intervals import Interval, Z

MARGIN = 0.05  # a loss of so much of the score is one that must not go unseen
MOST_ROWS = 100_000
MOST_EXACT = 1000
BISECTIONS = 50


@dataclass(frozen=True)
class Paired:
    """The comparison of model B with model A on the same rows.

    Attributes:
        rows: Number of rows compared.
        right: Rows that A has right.
        gained: Rows that A has wrong and B right.
        lost: Rows that A has right and B wrong.
        difference: Share right of B less that of A, with its 95% interval.
    """

    rows: int
    right: int
    gained: int
    lost: int
    difference: Interval

    @property
    def verdict(self) -> str:
        """The verdict: better, same (no loss of 5 points), worse, or how many rows would be needed to say."""
        found = _judge(self.difference)
        return found or f"not shown with {self.rows:,} rows ({self.rows_needed:,} would)"

    @property
    def rows_needed(self) -> int:
        """The number of rows that would decide it, if they came out like these; at most `MOST_ROWS`."""
        low, high = self.rows, MOST_ROWS
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            low, high = (low, middle) if _judge(self._scaled(middle)) else (middle, high)
        return high

    def _scaled(self, rows: int) -> Interval:
        right, gained, lost = (round(count * rows / self.rows) for count in (self.right, self.gained, self.lost))
        return difference(rows, gained, min(lost, right))

    @property
    def smallest_visible(self) -> float:
        """The smallest difference that so many rows can distinguish from none, if as large a share of them differs."""
        return (self.difference.high - self.difference.low) / 2

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "wrong_to_right": self.gained,
            "right_to_wrong": self.lost,
            "difference": self.difference.as_dict(),
            "verdict": self.verdict,
        }


def _judge(interval: Interval) -> str:
    """Return the verdict of an interval; empty: it is too wide for one."""
    if interval.low > 0:
        return "better"
    if interval.low >= -MARGIN:
        return "same"
    return "worse" if interval.high < 0 else ""


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two models by which of the same rows each has right.

    Args:
        before: Verdicts on model A, one a row: whether it is right.
        after: The same rows in the same order for model B.

    Raises:
        ValueError: The lengths differ, or there are no rows.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} and {len(after)} rows cannot be compared in pairs")
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return Paired(len(before), sum(before), gained, lost, difference(len(before), gained, lost))


def difference(rows: float, gained: float, lost: float) -> Interval:
    """Compute Tango's score interval (Statistics in Medicine 17:891, 1998) of B's share right less A's.

    Counts need not be whole: rows in groups count as the number of independent rows that they are worth.

    Args:
        rows: Rows that both answered.
        gained, lost: Rows that turned right, and wrong.
    """
    value = (gained - lost) / rows

    def is_plausible(share: float) -> bool:
        """Whether the score test does not refuse a true difference of so much."""
        b = (2 * rows - gained + lost) * share - gained - lost
        lost_share = (math.sqrt(max(0.0, b * b + 8 * rows * lost * share * (1 - share))) - b) / (4 * rows)
        variance = rows * (2 * lost_share + share * (1 - share))
        return abs(gained - lost - rows * share) <= Z * math.sqrt(max(0.0, variance))

    def end(outer: float) -> float:
        """Bisect between the value, which is plausible, and the largest or smallest difference there can be."""
        inner = value
        for _ in range(BISECTIONS):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if is_plausible(middle) else (inner, middle)
        return inner

    return Interval(value, end(-1.0), end(1.0))


def mcnemar(gained: int, lost: int) -> float:
    """Compute the two-sided p-value of McNemar's test that rows turn right as often as wrong.

    It is exact (binomial) up to `MOST_EXACT` rows that turned; beyond, normal with a continuity correction.
    """
    turned = gained + lost
    if turned > MOST_EXACT:
        return math.erfc(max(0.0, abs(gained - lost) - 1) / math.sqrt(2 * turned))
    tail = sum(math.comb(turned, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << turned))
