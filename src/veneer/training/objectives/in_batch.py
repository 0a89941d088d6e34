"""Embeddings: a text's positive among all texts of the optimizer step; see engine/embedder.py for the loss."""

from collections.abc import Iterable
from typing import Any

from veneer.data.batch import Batch
from veneer.engine.objective import NegativeLogLikelihood


class InBatchNegatives(NegativeLogLikelihood):
    """Minus the log-probability of each anchor's positive text, with the step's other texts as negatives."""

    def begin_step(self, engine: Any, batches: Iterable[Batch]) -> Iterable[Batch]:
        engine.begin_step(batches)
        return batches
