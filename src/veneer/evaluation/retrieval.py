"""Measures how well embeddings find the text that belongs to another: recall at k, and mean reciprocal rank.

Every held-out anchor looks for its positive among the positives and negatives of all held-out rows. Texts that are
equal to the positive or to the anchor are no wrong answers, and are left out. Ties count against the model, so that
embeddings that are all alike find nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.evaluation.metrics.metric import ShareRight
from veneer.evaluation.metrics.resampled import RowMean

CUTS = (1, 5, 10)  # ranks of recall at k


class Recall(ShareRight):
    """The share of anchors whose positive is among the first; `true` says it of each."""

    @property
    def value(self) -> float:
        """The value alone."""
        return sum(self.true) / len(self.true)


def ranks(
    anchors_ND: Any, candidates_MD: Any, anchors: Sequence[int], candidates: Sequence[int], right: Sequence[int]
) -> Any:
    """Return the rank of each anchor's positive among the candidates, from 1; int64, (N,).

    Args:
        anchors_ND, candidates_MD: normalized embeddings, NumPy arrays.
        anchors, candidates: numbers of their texts, equal for equal texts.
        right: position of each anchor's positive among the candidates.
    """
    texts = np.array(candidates)
    found = []
    for row, (anchor, positive) in enumerate(zip(anchors, right, strict=True)):
        scores_M = candidates_MD @ anchors_ND[row]
        is_other = (texts != texts[positive]) & (texts != anchor)
        found.append(1 + int((scores_M[is_other] >= scores_M[positive]).sum()))
    return np.array(found)


def retrieval_scores(ranks_N: Any, candidates: int) -> dict[str, RowMean | Recall]:
    """Return recall at 1, 5 and 10, as far as there are more candidates, and the mean reciprocal rank."""
    found = {f"recall@{k}": Recall((ranks_N <= k).tolist()) for k in CUTS if k < candidates}
    return {"mrr": RowMean((1 / ranks_N).tolist()), **found}
