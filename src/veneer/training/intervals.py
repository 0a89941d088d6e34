"""95% intervals: the range that the same measurement on other rows of the same kind would plausibly give."""

import math
from dataclasses import asdict, dataclass

Z = 1.959964  # 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95% interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def proportion(hits: int, rows: int) -> Interval:
    """Compute Wilson's score interval (1927), which holds for few rows and for shares near 0 and 1."""
    share = hits / rows
    middle = (share + Z * Z / (2 * rows)) / (1 + Z * Z / rows)
    half = Z / (1 + Z * Z / rows) * math.sqrt(share * (1 - share) / rows + Z * Z / (4 * rows * rows))
    # At 0 and 1 the bound is the share itself, but for rounding.
    return Interval(share, max(0.0, middle - half) if hits else 0.0, middle + half if hits < rows else 1.0)
