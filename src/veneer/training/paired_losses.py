"""Compares trained adapters by their losses on the same held-out rows, in pairs.

The same rows are hard for every adapter, so what counts is each row's difference; so a few dozen rows tell rates apart
whose mean losses differ by less than the spread of the rows. A loss is nats a trained token, each token by its weight:
a ratio of two sums over rows, whose variance is that of the usual linearization (Cochran 1977, section 6.4).

Where adapters were trained with several seeds, the difference varies with them as well: both variances are added, with
the degrees of freedom of Welch and Satterthwaite. With one seed nothing is known of others, and the interval is about
rows alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.training.intervals import Interval, Z

# 97.5% quantiles of Student's t for 1 to 10 degrees of freedom; beyond, an expansion in 1 / degrees holds to 0.2%.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class RowLosses:
    """The losses of one adapter on held-out rows.

    Attributes:
        losses: Summed loss of each row, in nats.
        weights: Summed weight of each row's trained tokens.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The loss of a trained token."""
        return sum(self.losses) / sum(self.weights)


def loss_interval(seeds: Sequence[RowLosses]) -> Interval:
    """Return the mean loss over seeds with its interval: over other seeds, or with one seed over other rows."""
    means = [found.mean for found in seeds]
    if len(seeds) > 1:
        return _interval(float(np.mean(means)), _variance_of_mean(means), len(seeds) - 1)
    return _interval(means[0], _variance_over_rows(seeds[0].losses, seeds[0].weights), len(seeds[0].losses) - 1)


def loss_difference(seeds: Sequence[RowLosses], base: Sequence[RowLosses]) -> Interval:
    """Subtract the losses of another adapter on the same rows, seed by seed; below 0: this one is better.

    Args:
        seeds: Losses of the adapter with each seed.
        base: Losses of the other adapter with the same seeds, in the same order.
    """
    pairs = list(zip(seeds, base, strict=True))
    assert all(one.weights == other.weights for one, other in pairs), "losses on the same rows are compared"
    weights = seeds[0].weights
    differences_SR = np.array([one.losses for one, _ in pairs]) - np.array([other.losses for _, other in pairs])
    means = (differences_SR.sum(axis=1) / sum(weights)).tolist()
    value = float(np.mean(means))
    of_rows, of_seeds = _variance_over_rows(differences_SR.mean(axis=0).tolist(), weights), 0.0
    degrees = float(len(weights) - 1)
    if len(pairs) > 1:
        of_seeds = _variance_of_mean(means)
        parts = of_rows**2 / max(1, len(weights) - 1) + of_seeds**2 / (len(pairs) - 1)
        degrees = (of_rows + of_seeds) ** 2 / parts if parts else degrees
    return _interval(value, of_rows + of_seeds, degrees)


def t_quantile(degrees: float) -> float:
    """Return the 97.5% quantile of Student's t, by the next lower whole number of degrees; infinite below 1."""
    whole = int(degrees)
    if whole < 1:
        return math.inf
    if whole <= len(T_QUANTILES):
        return T_QUANTILES[whole - 1]
    return Z + (Z**3 + Z) / (4 * whole) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * whole**2)


def _interval(value: float, variance: float, degrees: float) -> Interval:
    half = t_quantile(degrees) * math.sqrt(variance) if variance else 0.0
    return Interval(value, value - half, value + half)


def _variance_of_mean(values: Sequence[float]) -> float:
    return float(np.var(values, ddof=1)) / len(values)


def _variance_over_rows(losses: Sequence[float], weights: Sequence[float]) -> float:
    """Return the variance of summed losses over summed weights, were other rows drawn; infinite of one row."""
    rows = len(losses)
    if rows < 2:
        return math.inf
    losses_R, weights_R = np.asarray(losses, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    residuals_R = losses_R - losses_R.sum() / weights_R.sum() * weights_R
    return float((residuals_R**2).sum() * rows / (rows - 1) / weights_R.sum() ** 2)
