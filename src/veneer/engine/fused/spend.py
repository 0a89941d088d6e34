"""Spends the memory that is left where it saves most time.

A pass that keeps nothing but each block's input is run once on made-up tokens, as long as the longest batch: what it
takes at its peak is measured, not computed, since only the device knows what its libraries take for themselves. What
the budget has beyond that goes to the tensors whose recomputation costs most time a byte, from the last block to the
first, since backward frees those first; then to 16-bit copies of 4-bit weights, which save least.

A tensor that is kept adds its bytes to every moment of a step until its block's backward, so the peak grows by no more
than the sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

from veneer.engine.fused.block import TENSORS, Block
from veneer.engine.fused.group import Group

SAFETY = 0.02  # of the budget: pages the allocator cannot fill


class Spending(NamedTuple):
    """What is kept.

    Attributes:
        keep: Of TENSORS, for each block.
        dequantized: Groups whose weights stay in 16 bits too.
        spent_bytes: What that adds to the peak.
    """

    keep: tuple[frozenset[str], ...]
    dequantized: tuple[Group, ...]
    spent_bytes: int


def spend(blocks: Sequence[Block], tokens: int, longest: int, spare_bytes: int, budget_bytes: int) -> Spending:
    """What to keep.

    Args:
        blocks: Of the model.
        tokens: Of the largest batch.
        longest: Tokens of a usual document.
        spare_bytes: What the budget has beyond a pass that keeps nothing.
        budget_bytes: The whole of it.
    """
    left = spare_bytes - int(SAFETY * budget_bytes)
    keep: list[set[str]] = [set() for _ in blocks]
    wishes = []
    for number, block in enumerate(blocks):
        for name in TENSORS:
            size = block.kept_bytes(name, tokens)
            wishes.append((-block.kept_seconds(name, tokens, longest) / size, -number, name, size))
    spent = 0
    for _, minus, name, size in sorted(wishes):
        if size <= left - spent:
            keep[-minus].add(name)
            spent += size
    dequantized = []
    for block in reversed(blocks):
        for group in block.groups:
            size = group.size * block.dtype.itemsize
            if group.needs_scratch and size <= left - spent:
                dequantized.append(group)
                spent += size
    return Spending(tuple(frozenset(names) for names in keep), tuple(dequantized), spent)
