"""Batches for the held-out loss; their size affects memory and speed alone, so it may be halved during a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.data.batch import Batch
from veneer.data.pipeline import Part


class HeldOutBatches(Sequence[Batch]):
    """Held-out examples in batches of like length, made as they are asked for.

    Args:
        part: The examples.
        size: Rows of a batch.
    """

    def __init__(self, part: Part, size: int) -> None:
        self.size = size
        self._part = part
        self._order = np.argsort(-part.lengths, kind="stable")

    def halved(self) -> "HeldOutBatches":
        """Return the same examples in batches of half as many."""
        return HeldOutBatches(self._part, max(1, min(self.size, len(self._order)) // 2))

    def __len__(self) -> int:
        return -(-len(self._order) // self.size)

    def __getitem__(self, at: Any) -> Any:
        if not 0 <= at < len(self):
            raise IndexError(at)
        return Batch.of([self._part[int(n)] for n in self._order[at * self.size : (at + 1) * self.size]])
