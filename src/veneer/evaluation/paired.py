"""Paired comparison of two models on the same rows: which answers changed, and whether the difference is significant.

The same rows are hard for both models, so what counts is where they differ (McNemar 1947): rows that one has right and
the other wrong. The interval of the difference is Newcombe's score interval for paired proportions (1998, method 10),
which holds for few rows and for differences of zero, where the usual normal interval has no width at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.evaluation.intervals import Interval, proportion

MARGIN = 0.05  # a loss of so much of the score is one that must not go unseen
MOST_ROWS = 100_000


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
        return difference(rows, right, gained, min(lost, right))

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
    return Paired(len(before), sum(before), gained, lost, difference(len(before), sum(before), gained, lost))


def difference(rows: int, right: int, gained: int, lost: int) -> Interval:
    """Compute Newcombe's interval (1998, method 10, continuity-corrected correlation) of B's share less A's.

    Args:
        rows: Rows that both answered.
        right: Rows that A has right.
        gained, lost: Rows that turned right, and wrong.
    """
    one, two = proportion(right, rows), proportion(right + gained - lost, rows)
    both, neither = right - lost, rows - right - gained
    product = right * (rows - right) * (right + gained - lost) * (rows - right - gained + lost)
    agreement = float(both * neither - gained * lost)
    if agreement > 0:
        agreement = max(0.0, agreement - rows / 2)
    phi = agreement / math.sqrt(product) if product else 0.0
    value = two.value - one.value

    def distance(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up * up - 2 * phi * up * down + down * down))

    low = value - distance(two.value - two.low, one.high - one.value)
    high = value + distance(two.high - two.value, one.value - one.low)
    return Interval(value, max(-1.0, low), min(1.0, high))
