"""Thins out and smooths the numbers that a page draws: a page stays small, however long its run."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

MOST_POINTS = 500  # of a series
Point = tuple[float, float]


def points_of(records: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """Return step and value of the records that have a finite number there."""
    found = ((record["step"], record.get(key)) for record in records)
    return [(step, value) for step, value in found if is_number(value)]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Keep at most so many points, and each extreme: of equal parts of a series the lowest and the highest.

    The first and the last point stay, so that a line has its ends.
    """
    if len(points) <= most:
        return list(points)
    inner, parts = points[1:-1], max(1, (most - 2) // 2)
    kept = {0, len(points) - 1}
    for part in range(parts):
        start, end = (len(inner) * part) // parts, (len(inner) * (part + 1)) // parts
        values = [inner[n][1] for n in range(start, end)]
        if values:
            kept |= {1 + start + values.index(min(values)), 1 + start + values.index(max(values))}
    return [points[n] for n in sorted(kept)]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Average over a window around each point, about a fifteenth of the run wide; the curve does not lag."""
    half = max(1, len(points) // 30)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for n, (step, _) in enumerate(points):
        start, end = max(0, n - half), min(len(points), n + half + 1)
        found.append((step, (sums[end] - sums[start]) / (end - start)))
    return found


def median(values: Sequence[float]) -> float:
    """Return the middle value of some; 0: there are none."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def rounded(value: float) -> float:
    """Return a number with the digits that a picture can show."""
    return float(f"{value:.5g}")
