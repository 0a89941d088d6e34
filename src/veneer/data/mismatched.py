"""Lays each prompt of rated rows before the answer of another row."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from veneer.data.batch import Example


class MismatchedRows(Sequence[Example]):
    """Each example with what stands behind its prompt in another one; the only example with its own.

    Args:
        examples: examples with one answer, or with consecutive ones, at their end.
        max_length: tokens of an example, at most; what is beyond is cut off.
        seed: seed of which answer stands behind which prompt.
    """

    def __init__(self, examples: Sequence[Example], max_length: int, seed: int) -> None:
        self._examples = examples
        self._max_length = max_length
        order = np.random.default_rng(seed).permutation(len(examples))
        self._other = np.empty(len(examples), dtype=np.int64)
        self._other[order] = np.roll(order, 1)  # one circle through all, so that none has its own

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        row, other = self._examples[at], self._examples[int(self._other[at])]
        end, start = row.spans[0][0], other.spans[0][0]
        spans = tuple((first - start + end, last - start + end, weight) for first, last, weight in other.spans)
        ids = np.concatenate([row.ids[:end], other.ids[start:]])
        return Example(ids, spans, row.place).cut(self._max_length)
