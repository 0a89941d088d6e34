"""Bits per byte of the references: the loss divided by the length of the text and not by the number of tokens.

Perplexities of models with different tokenizers cannot be compared, since a token is more text to one of them; bits a
UTF-8 byte can (Gao et al. 2020, arXiv 2101.00027). Special tokens, such as the end of a turn, are in the loss and have
no bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.evaluation.metrics.metric import Metric, ScoredRows, needs_nothing
from veneer.evaluation.metrics.resampled import Pooled


@dataclass(frozen=True)
class BitsPerByte(Pooled):
    """Bits per byte over rows.

    Attributes:
        losses: Summed loss of each row, in nats.
        bytes: UTF-8 bytes of each row's trained text.
    """

    losses: Sequence[float]
    bytes: Sequence[float]

    @property
    def better(self) -> str:
        return "lower"

    def counts(self) -> Any:
        return np.stack([self.losses, self.bytes], axis=1)

    def statistic(self, sums_SK: Any) -> Any:
        # A resample of rows without any text has one byte, so that it does not divide by zero.
        return sums_SK[:, 0] / math.log(2) / np.maximum(sums_SK[:, 1], 1)


def measure(rows: ScoredRows) -> dict[str, BitsPerByte]:
    """Measure `bits_per_byte`, where the losses of the rows are known."""
    return {"bits_per_byte": BitsPerByte(rows.losses, rows.bytes)} if rows.losses else {}


BITS_PER_BYTE = Metric("bits_per_byte", measure, needs_nothing, reads="losses")
