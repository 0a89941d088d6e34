"""95% intervals: what the same measurement on other rows of the same kind would plausibly give."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

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
    """Wilson's score interval (1927), which holds for few rows and for shares near 0 and 1."""
    share = hits / rows
    middle = (share + Z * Z / (2 * rows)) / (1 + Z * Z / rows)
    half = Z / (1 + Z * Z / rows) * math.sqrt(share * (1 - share) / rows + Z * Z / (4 * rows * rows))
    # At 0 and 1 the bound is the share itself, but for rounding.
    return Interval(share, max(0.0, middle - half) if hits else 0.0, middle + half if hits < rows else 1.0)


def perplexity(losses: Sequence[float], tokens: Sequence[float], resamples: int = 2000) -> Interval:
    """exp(summed loss / tokens) over rows, with a bootstrap interval that resamples rows (seeded).

    Rows, not tokens, are resampled, since the tokens of one row are not independent.
    """
    losses_R, tokens_R = np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    means_S = _resampled(losses_R, tokens_R, resamples)
    low, high = np.quantile(means_S, [0.025, 0.975])
    value = losses_R.sum() / tokens_R.sum()
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(x)) for x in (value, low, high)))


def perplexity_difference(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[float], resamples: int = 2000
) -> Interval:
    """Perplexity of model B less that of A on the same rows, with a bootstrap interval that resamples pairs (seeded).

    Args:
        before, after: Summed loss of each row for A and for B.
        tokens: Trained tokens of each row.
        resamples: Of the bootstrap.
    """
    tokens_R = np.asarray(tokens, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        one, two = (np.exp(_resampled(np.asarray(x, dtype=np.float64), tokens_R, resamples)) for x in (before, after))
        low, high = np.quantile(two - one, [0.025, 0.975])
        value = np.exp(sum(after) / tokens_R.sum()) - np.exp(sum(before) / tokens_R.sum())
    return Interval(float(value), float(low), float(high))


def _resampled(losses_R: Any, tokens_R: Any, resamples: int) -> Any:
    """Mean loss of a token in each of many samples of the rows; the same samples for as many rows."""
    rng = np.random.default_rng(0)
    chosen_SR = rng.integers(len(losses_R), size=(resamples, len(losses_R)))
    return losses_R[chosen_SR].sum(axis=1) / tokens_R[chosen_SR].sum(axis=1)
