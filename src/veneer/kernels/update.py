"""Defers the adapters' addition to a product, y += u b with u = x A^T, to the norm that reads y next.

The large product has A as further rows, so u comes out of it as further columns of y. Adding u b by a product of its
own would read and write y once more; the norm reads y anyway. The sum is computed in float32, where PEFT rounds three
times.

The product y must not be a bfloat16 number when it is added to the residual stream, which is one. Their sum would often
be midway between two bfloat16 numbers, and there the sign of u b alone, however small, would decide the rounding. (In
the first steps of training that made adapters seem ten to twenty times as large.) So y is stored `OFF_GRID` times too
large, and divided in the sum: an irrational factor leaves no pattern, and costs nothing.

Shapes: T tokens, N outputs, R stacked ranks.
"""

import math
from typing import NamedTuple

import torch

OFF_GRID = (1 + math.sqrt(5)) / 2  # multiples of its reciprocal are the most evenly spread between integers


class Update(NamedTuple):
    """An addition that is still to be made.

    Attributes:
        u_TR: low-rank activations, with any row stride and dense columns.
        b_RN: the adapters' B, likewise.
        scale: factor of y as it is stored.
    """

    u_TR: torch.Tensor
    b_RN: torch.Tensor
    scale: float = 1.0


def updated(y_TN: torch.Tensor, update: Update | None) -> torch.Tensor:
    """Compute scale y + u b in float32; the plain torch twin."""
    wide_TN = y_TN.float()
    return wide_TN if update is None else update.scale * wide_TN + update.u_TR.float() @ update.b_RN.float()
