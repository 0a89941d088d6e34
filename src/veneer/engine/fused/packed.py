"""Lays the packed 4-bit weights and constants of a block in one piece of memory, so that one copy moves them."""

from collections.abc import Iterable, Sequence

import torch

from veneer.engine.fused.group import Group
from veneer.engine.fused.pinned import ALIGNMENT
from veneer.kernels.nf4 import PackedNF4


def copied(groups: Sequence[Group], buffer: torch.Tensor) -> list[list[PackedNF4]]:
    """Copy the weights of groups to a buffer, one behind the other, and return them as views of it."""
    found, start = [], 0
    for group in groups:
        views, start = laid_out(group.packed, buffer, start)
        for view, packed in zip(views, group.packed, strict=True):
            for target, source in zip(view.large, packed.large, strict=True):
                target.copy_(source)
        found.append(views)
    return found


def block_bytes(groups: Iterable[Group]) -> int:
    """Return the bytes of a block's packed weights and constants, each aligned; 0: it is not quantized."""
    return sum(aligned(tensor.nbytes) for group in groups for packed in group.packed for tensor in packed.large)


def aligned(count: int) -> int:
    """Return a number of bytes as a multiple of what pieces of memory are aligned to."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def laid_out(matrices: Sequence[PackedNF4], buffer: torch.Tensor, start: int) -> tuple[list[PackedNF4], int]:
    """Return the same matrices as views of a buffer, one behind the other, and the end of the last."""
    found = []
    for packed in matrices:
        views = []
        for tensor in packed.large:
            views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype))
            start += aligned(tensor.nbytes)
        found.append(packed.with_large(views))
    return found, start
