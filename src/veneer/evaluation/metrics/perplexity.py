"""Perplexity of the references: exp of the mean loss of a trained token.

Intervals are bootstraps that resample rows and not tokens, since the tokens of one row are not independent; they are
seeded, and the same rows are drawn for both models of a difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from veneer.evaluation.intervals import Interval
from veneer.evaluation.metrics.metric import ScoredRows

RESAMPLES = 2000


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over rows.

    Attributes:
        losses: Summed loss of each row.
        tokens: Trained tokens of each row.
    """

    losses: Sequence[float]
    tokens: Sequence[float]
    unit: ClassVar[str] = ""

    @property
    def interval(self) -> Interval:
        low, high = np.quantile(self._resampled(), [0.025, 0.975])
        with np.errstate(over="ignore"):
            return Interval(*(float(np.exp(x)) for x in (np.sum(self.losses) / np.sum(self.tokens), low, high)))

    def difference(self, base: "Perplexity") -> Interval:
        tokens = np.sum(self.tokens)
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = np.quantile(np.exp(self._resampled()) - np.exp(base._resampled()), [0.025, 0.975])
            value = np.exp(sum(self.losses) / tokens) - np.exp(sum(base.losses) / tokens)
        return Interval(float(value), float(low), float(high))

    def _resampled(self) -> Any:
        """Return the mean loss of a token in each of many resamples of the rows; equal counts get equal resamples."""
        losses_R, tokens_R = np.asarray(self.losses, dtype=np.float64), np.asarray(self.tokens, dtype=np.float64)
        chosen_SR = np.random.default_rng(0).integers(len(losses_R), size=(RESAMPLES, len(losses_R)))
        return losses_R[chosen_SR].sum(axis=1) / tokens_R[chosen_SR].sum(axis=1)


def measure(rows: ScoredRows) -> dict[str, Perplexity]:
    """Measure `perplexity`, where the losses of the rows are known."""
    return {"perplexity": Perplexity(rows.losses, rows.tokens)} if rows.losses else {}
