"""What adapters add to a product, y += u b with u = x A^T: made by the norm that reads y next.

The large product carries A as further rows, so u comes out of it as further columns of y. Adding u b with a product of
its own would read and write y once more; the norm reads y anyway. The sum is made in float32, where PEFT rounds three
times.

One thing must not be: that y lies on bfloat16's own grid when it is added to the residual stream, which does. Their sum
would often lie midway between two numbers of that grid, and there the sign of u b alone, however small it is, would
decide between them. (In the first steps of a training that made adapters seem ten to twenty times as large.) So y is
stored `OFF_GRID` times too large, and divided in the sum: an irrational factor leaves no pattern, and costs nothing.

Shapes: T tokens, N outputs, R stacked ranks.
"""

import math
from typing import NamedTuple

import torch

OFF_GRID = (1 + math.sqrt(5)) / 2  # multiples of its reciprocal are the most evenly spread between integers


class Update(NamedTuple):
    """A sum still to be made.

    Attributes:
        u_TR: Rows may lie apart; columns are dense.
        b_RN: The same.
        scale: Of y, as it is stored.
    """

    u_TR: torch.Tensor
    b_RN: torch.Tensor
    scale: float = 1.0


def updated(y_TN: torch.Tensor, update: Update | None) -> torch.Tensor:
    """The twin: scale y + u b in float32."""
    wide_TN = y_TN.float()
    return wide_TN if update is None else update.scale * wide_TN + update.u_TR.float() @ update.b_RN.float()
