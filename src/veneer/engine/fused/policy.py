"""Chooses the placement of each tensor: memory that is left is used where it saves most time.

A pass that keeps nothing but each block's input is run once on a dummy batch as long as the longest: its peak is
measured, not computed, since only the device knows the memory of its libraries; a plan uses a dry run's peak. The
budget beyond that goes first, up to half of it, to the workspace of attention's backward over rows of one length, which
is faster in one call than in many (`cudnn`), and which all blocks share; then to the activations whose recomputation
costs most time a byte, from the last block to the first, since backward frees those first; then to 16-bit copies of
4-bit weights, which save least.

An activation that is kept adds its bytes to every point of a step until its block's backward, so the peak grows by no
more than the sum.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from veneer.engine.fused.block import ACTIVATIONS, Block
from veneer.engine.fused.cudnn import WORKSPACE_BYTES, Call
from veneer.engine.placement import ActivationState, BlockPlacement, MemoryPlacement, WeightState

SAFETY = 0.02  # share of the budget that fragmentation may take
SMALL = 2048  # tokens; shorter passes gain from replay, even those of 8B models on an H100 (`bench/replays.py`)


@dataclass(frozen=True)
class Demand:
    """The memory of a pass that keeps nothing, measured or by a dry run.

    Attributes:
        tokens: tokens of the largest batch, as passes pad it.
        longest: tokens of its longest document.
        rows: number of its documents if cuDNN computes their attention; else 0.
        least_bytes: memory of the device at the peak of such a pass.
        pass_bytes: part of it that is freed after the pass.
        held_out_bytes: memory of a held-out loss, which comes beside recorded passes.
        varies: whether batches have several shapes.
    """

    tokens: int
    longest: int
    rows: int
    least_bytes: int
    pass_bytes: int = 0
    held_out_bytes: int = 0
    varies: bool = False


def block_placement(keep: Collection[str], weights: Collection[str] = (), block: Block | None = None) -> BlockPlacement:
    """Return the placement of a block that keeps some activations and recomputes the others.

    Args:
        keep: names of ACTIVATIONS.
        weights: names of weights that are kept dequantized.
        block: the block, whose other 4-bit weights stay as they are; None: only `weights` are listed.
    """
    states = dict.fromkeys(ACTIVATIONS, ActivationState.RECOMPUTE) | dict.fromkeys(keep, ActivationState.KEEP)
    groups = {} if block is None else block.weights
    by_need = {True: WeightState.NF4, False: WeightState.DEQUANTIZED}
    held = {name: by_need[group.needs_scratch] for name, group in groups.items() if group.is_quantized}
    return BlockPlacement(states, held | dict.fromkeys(weights, WeightState.DEQUANTIZED))


def uniform(
    blocks: Sequence[Block], keep: Collection[str] = ACTIVATIONS, keep_last: Collection[str] = ACTIVATIONS
) -> MemoryPlacement:
    """Return a placement in which all blocks but the last are alike; backward needs the last one's at once."""
    chosen = [block_placement(keep, block=block) for block in blocks[:-1]]
    last = block_placement(keep_last, block=blocks[-1])
    return MemoryPlacement((*chosen, last), WORKSPACE_BYTES)


def checkpointed(blocks: Sequence[Block], gradient_checkpointing: bool | str) -> MemoryPlacement:
    """Return the placement that `train.gradient_checkpointing` asks for; auto begins as true."""
    return uniform(blocks, ACTIVATIONS if gradient_checkpointing is False else ())


def choose_placement(blocks: Sequence[Block], demand: Demand, budget_bytes: int, records: bool) -> MemoryPlacement:
    """Return the placement that a budget allows.

    Recorded passes never free their memory, and a pass of another shape needs its own beside it. Where shapes vary,
    passes are recorded only if everything fits twice. Else activations make better use of the memory, except where
    passes are so small that the host takes longer to launch them than the GPU to compute: these get half of it.

    Args:
        blocks: blocks of the model.
        demand: memory of a pass that keeps nothing.
        budget_bytes: memory of the device for tensors, those allocated now included.
        records: whether passes can be recorded.
    """
    spare = budget_bytes - demand.least_bytes - demand.held_out_bytes
    found = _fill(blocks, demand, spare, budget_bytes)
    if records and demand.varies:
        everything = sum(block.saved_bytes(name, demand.tokens) for block in blocks for name in ACTIVATIONS)
        second = spare - demand.pass_bytes  # memory left beside a second pass
        if found.bytes + everything > second:
            records = second > 0 and demand.tokens < SMALL
            found = _fill(blocks, demand, second // 2, budget_bytes) if records else found
    return replace(found, records_passes=records, least_bytes=demand.least_bytes, budget_bytes=budget_bytes)


def _fill(blocks: Sequence[Block], demand: Demand, spare_bytes: int, budget_bytes: int) -> MemoryPlacement:
    """Return the placement that fills the memory left beside a pass that keeps nothing."""
    left = spare_bytes - int(SAFETY * budget_bytes)
    workspace, used = _workspace(blocks[0], demand, left // 2)
    keep: list[set[str]] = [set() for _ in blocks]
    wishes = []
    for number, block in enumerate(blocks):
        for name in ACTIVATIONS:
            size = block.saved_bytes(name, demand.tokens)
            saves = block.recompute_cost(name, demand.tokens, demand.longest) / size
            wishes.append((-saves, -number, name, size))
    for _, minus, name, size in sorted(wishes):
        if size <= left - used:
            keep[-minus].add(name)
            used += size
    dequantize: list[set[str]] = [set() for _ in blocks]
    for block, chosen in zip(reversed(blocks), reversed(dequantize), strict=True):
        for name, group in block.weights.items():
            size = group.size * block.dtype.itemsize
            if group.needs_scratch and size <= left - used:
                chosen.add(name)
                used += size
    chosen_by_block = zip(keep, dequantize, blocks, strict=True)
    return MemoryPlacement(tuple(block_placement(*of_block) for of_block in chosen_by_block), workspace, bytes=used)


def _workspace(block: Block, demand: Demand, left: int) -> tuple[int, int]:
    """Return the workspace of attention's backward, and the part of the memory left that it takes."""
    if not demand.rows:
        return WORKSPACE_BYTES, 0
    rows, length, heads = demand.rows, demand.longest, block.decoder.heads
    usual = Call.of(rows, length, heads, WORKSPACE_BYTES).workspace_bytes(length)
    workspace = Call.of(rows, length, heads, usual + max(0, left)).workspace_bytes(length)
    return max(workspace, WORKSPACE_BYTES), workspace - usual
