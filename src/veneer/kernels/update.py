"""What adapters add to a product, y += u b with u = x A^T: made by the norm that reads y next.

The large product carries A as further rows, so u comes out of it as further columns of y. Adding u b with a product of
its own would read and write y once more; the norm reads y anyway. The sum is made in float32, where PEFT rounds three
times.

Shapes: T tokens, N outputs, R stacked ranks.
"""

from typing import NamedTuple

import torch


class Update(NamedTuple):
    """A sum still to be made.

    Attributes:
        u_TR: Rows may lie apart; columns are dense.
        b_RN: The same.
    """

    u_TR: torch.Tensor
    b_RN: torch.Tensor


def updated(y_TN: torch.Tensor, update: Update | None) -> torch.Tensor:
    """The twin: y + u b in float32."""
    wide_TN = y_TN.float()
    return wide_TN if update is None else wide_TN + update.u_TR.float() @ update.b_RN.float()
