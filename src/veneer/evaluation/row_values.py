"""What a metric measured of each row, from its result: what comparisons pair."""

import numpy as np

from veneer.evaluation.bootstrap import FEWEST, jackknife_values
from veneer.evaluation.differences import RowValues
from veneer.evaluation.metrics.metric import MetricResult, ShareRight
from veneer.evaluation.metrics.perplexity import Perplexity


def row_values(result: MetricResult) -> RowValues | None:
    """Return the value of each row, whose mean is the metric's; None: it has none, or too few rows to tell."""
    if isinstance(result, ShareRight):
        return RowValues([float(right) for right in result.right], "higher", "share")
    if isinstance(result, Perplexity) and len(result.losses) >= FEWEST:
        counts_RK = np.stack([result.losses, result.tokens], axis=1).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite perplexity is compared by nothing
            return RowValues(jackknife_values(counts_RK, lambda sums: np.exp(sums[:, 0] / sums[:, 1])), "lower")
    return None
