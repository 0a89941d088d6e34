"""What a metric measured of each row, from its result: what comparisons pair."""

import numpy as np

from veneer.evaluation.differences import RowValues
from veneer.evaluation.metrics.metric import MetricResult, Share
from veneer.evaluation.metrics.resampled import Pooled
from veneer.training.bootstrap import FEWEST, jackknife_values


def row_values(result: MetricResult) -> RowValues | None:
    """Return the value of each row, whose mean is the metric's; None: it has none, or too few rows to tell."""
    if isinstance(result, Share):
        return RowValues([float(true) for true in result.true], result.better, result.unit)
    if not isinstance(result, Pooled):
        return None
    counts_RK = np.asarray(result.counts(), dtype=np.float64)
    if len(counts_RK) < FEWEST:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite perplexity is compared by nothing
        values = jackknife_values(counts_RK, lambda sums_SK: result.shown(result.statistic(sums_SK)))
    return RowValues(values, result.better, result.unit)
