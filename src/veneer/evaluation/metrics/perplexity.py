"""Perplexity of the references: exp of the mean loss of a trained token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.evaluation.metrics.metric import Metric, ScoredRows, needs_nothing
from veneer.evaluation.metrics.resampled import Pooled


@dataclass(frozen=True)
class Perplexity(Pooled):
    """Perplexity over rows.

    Attributes:
        losses: Summed loss of each row.
        tokens: Trained tokens of each row.
    """

    losses: Sequence[float]
    tokens: Sequence[float]

    @property
    def better(self) -> str:
        return "lower"

    def counts(self) -> Any:
        return np.stack([self.losses, self.tokens], axis=1)

    def statistic(self, sums_SK: Any) -> Any:
        return sums_SK[:, 0] / sums_SK[:, 1]

    def shown(self, statistic: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(statistic)


def measure(rows: ScoredRows) -> dict[str, Perplexity]:
    """Measure `perplexity`, where the losses of the rows are known."""
    return {"perplexity": Perplexity(rows.losses, rows.tokens)} if rows.losses else {}


PERPLEXITY = Metric("perplexity", measure, needs_nothing, reads="losses")
