"""Spends the memory that is left where it saves most time.

A pass that keeps nothing but each block's input is run once on made-up tokens, as long as the longest batch: what it
takes at its peak is measured, not computed, since only the device knows what its libraries take for themselves. What
the budget has beyond that goes first, up to half of it, to the backward of attention over rows of one length, which is
faster in one call than in many (`cudnn`), and whose room all blocks share; then to the tensors whose recomputation
costs most time a byte, from the last block to the first, since backward frees those first; then to 16-bit copies of
4-bit weights, which save least.

A tensor that is kept adds its bytes to every point of a step until its block's backward, so the peak grows by no more
than the sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

from veneer.engine.fused.block import TENSORS, Block
from veneer.engine.fused.cudnn import ROOM_BYTES, Call
from veneer.engine.fused.group import Group

SAFETY = 0.02  # of the budget: pages the allocator cannot fill


class Spending(NamedTuple):
    """What is kept.

    Attributes:
        keep: Of TENSORS, for each block.
        dequantized: Groups whose weights stay in 16 bits too.
        spent_bytes: What that adds to the peak.
        room_bytes: What attention's backward may take on the way.
    """

    keep: tuple[frozenset[str], ...]
    dequantized: tuple[Group, ...]
    spent_bytes: int
    room_bytes: int


def spend(
    blocks: Sequence[Block], tokens: int, longest: int, rows: int, spare_bytes: int, budget_bytes: int
) -> Spending:
    """What to keep.

    Args:
        blocks: Of the model.
        tokens: Of the largest batch.
        longest: Tokens of a usual document.
        rows: Documents, if cuDNN takes them; else 0.
        spare_bytes: What the budget has beyond a pass that keeps nothing.
        budget_bytes: The whole of it.
    """
    left = spare_bytes - int(SAFETY * budget_bytes)
    room, spent = _room(blocks[0], longest, rows, left // 2)
    keep: list[set[str]] = [set() for _ in blocks]
    wishes = []
    for number, block in enumerate(blocks):
        for name in TENSORS:
            size = block.kept_bytes(name, tokens)
            wishes.append((-block.kept_seconds(name, tokens, longest) / size, -number, name, size))
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
    return Spending(tuple(frozenset(names) for names in keep), tuple(dequantized), spent, room)


def _room(block: Block, length: int, rows: int, left: int) -> tuple[int, int]:
    """Room for attention's backward, and how much of what is left that takes."""
    if not rows:
        return ROOM_BYTES, 0
    heads = block.decoder.heads
    usual = Call.of(rows, length, heads, ROOM_BYTES).workspace_bytes(length)
    room = Call.of(rows, length, heads, usual + max(0, left)).workspace_bytes(length)
    return max(room, ROOM_BYTES), room - usual
