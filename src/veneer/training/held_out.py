"""Held-out rows of a run, in the order in which their loss is measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.data.batch import Example
from veneer.data.pipeline import Part
from veneer.training.paired_losses import RowLosses


class HeldOutRows(Sequence[Example]):
    """Held-out examples, the longest rows first, so that consecutive ones are of like length.

    Args:
        part: The examples.
        documents_per_row: Consecutive examples that stay together.

    Attributes:
        documents_per_row: the argument.
        order: Number of each among the examples of the part.
        lengths: Tokens of each.
    """

    def __init__(self, part: Part, documents_per_row: int = 1) -> None:
        self._part = part
        self.documents_per_row = documents_per_row
        rows = np.argsort(-part.lengths.reshape(-1, documents_per_row).sum(1), kind="stable")
        self.order = (rows[:, None] * documents_per_row + np.arange(documents_per_row)).reshape(-1)
        self.lengths = part.lengths[self.order]

    def by_row(self, losses: Sequence[float]) -> RowLosses:
        """Add up the losses of examples, in this order, by the row that each is of; rows are in the data's order."""
        _, number = np.unique(self._part.corpus.row_of[self._part.examples[self.order]], return_inverse=True)
        weights = [example.weight for example in self]
        return RowLosses(*(tuple(np.bincount(number, values).tolist()) for values in (losses, weights)))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: Any) -> Any:
        chosen = self.order[at]
        return [self._part[int(n)] for n in chosen] if isinstance(at, slice) else self._part[int(chosen)]
