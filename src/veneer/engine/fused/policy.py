"""Chooses where each tensor lives: the memory that is left goes where it saves most time.

A pass that keeps nothing but each block's input is run once on made-up tokens, as long as the longest batch: what it
takes at its peak is measured, not computed, since only the device knows what its libraries take for themselves; a plan
takes a dry run's peak. What the budget has beyond that goes first, up to half of it, to the backward of attention over
rows of one length, which is faster in one call than in many (`cudnn`), and whose workspace all blocks share; then to
the activations whose recomputation costs most time a byte, from the last block to the first, since backward frees those
first; then to 16-bit copies of 4-bit weights, which save least.

An activation that is kept adds its bytes to every point of a step until its block's backward, so the peak grows by no
more than the sum.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from veneer.engine.fused.block import ACTIVATIONS, Block
from veneer.engine.fused.cudnn import WORKSPACE_BYTES, Call
from veneer.engine.placement import ActivationState, BlockPlacement, MemoryPlacement, WeightState

SAFETY = 0.02  # of the budget: pages the allocator cannot fill
SMALL = 2048  # tokens; passes below gain from being replayed, even those of 8B models on an H100 (`bench/replays.py`)


@dataclass(frozen=True)
class Demand:
    """What a pass that keeps nothing needs, measured or by a dry run.

    Attributes:
        tokens: tokens of the largest batch, as passes pad it.
        longest: tokens of its longest document.
        rows: its documents, if cuDNN computes their attention; else 0.
        least_bytes: memory of the device at the peak of such a pass.
        pass_bytes: the part of it that comes and goes with the pass.
        held_out_bytes: memory of a held-out loss, which comes beside recorded passes.
        varies: whether batches come in several shapes.
    """

    tokens: int
    longest: int
    rows: int
    least_bytes: int
    pass_bytes: int = 0
    held_out_bytes: int = 0
    varies: bool = False


def block_placement(keep: Collection[str], weights: Collection[str] = (), block: Block | None = None) -> BlockPlacement:
    """A block that keeps some activations and recomputes the others.

    Args:
        keep: names of ACTIVATIONS.
        weights: names of weights that are dequantized for good.
        block: the block, whose other 4-bit weights stay as they are; None: only `weights` are named.
    """
    states = dict.fromkeys(ACTIVATIONS, ActivationState.RECOMPUTE) | dict.fromkeys(keep, ActivationState.KEEP)
    groups = {} if block is None else block.weights
    by_need = {True: WeightState.NF4, False: WeightState.DEQUANTIZED}
    held = {name: by_need[group.needs_scratch] for name, group in groups.items() if group.is_quantized}
    return BlockPlacement(states, held | dict.fromkeys(weights, WeightState.DEQUANTIZED))


def uniform(
    blocks: Sequence[Block], keep: Collection[str] = ACTIVATIONS, keep_last: Collection[str] = ACTIVATIONS
) -> MemoryPlacement:
    """The placement in which each block but the last keeps the same; what the last keeps, backward needs at once."""
    chosen = [block_placement(keep, block=block) for block in blocks[:-1]]
    last = block_placement(keep_last, block=blocks[-1])
    return MemoryPlacement((*chosen, last), WORKSPACE_BYTES)


def checkpointed(blocks: Sequence[Block], gradient_checkpointing: bool | str) -> MemoryPlacement:
    """The placement that `train.gradient_checkpointing` asks for; auto begins with that of true."""
    return uniform(blocks, ACTIVATIONS if gradient_checkpointing is False else ())


def place(blocks: Sequence[Block], demand: Demand, budget_bytes: int, records: bool) -> MemoryPlacement:
    """The placement that a budget allows.

    Recorded passes hold their memory for good, and a pass of another shape needs its own beside it. Where shapes vary,
    passes are recorded only if all of that fits twice. Else the memory is better used for activations, but where passes
    are so small that the host takes longer to launch them than the GPU to compute: there, half of it is.

    Args:
        blocks: blocks of the model.
        demand: what a pass needs that keeps nothing.
        budget_bytes: what tensors may take on the device, those there now included.
        records: whether passes can be recorded.
    """
    spare = budget_bytes - demand.least_bytes - demand.held_out_bytes
    found = _fill(blocks, demand, spare, budget_bytes)
    if records and demand.varies:
        everything = sum(block.saved_bytes(name, demand.tokens) for block in blocks for name in ACTIVATIONS)
        second = spare - demand.pass_bytes  # what is left beside a second pass
        if found.bytes + everything > second:
            records = second > 0 and demand.tokens < SMALL
            found = _fill(blocks, demand, second // 2, budget_bytes) if records else found
    return replace(found, records_passes=records, least_bytes=demand.least_bytes, budget_bytes=budget_bytes)


def _fill(blocks: Sequence[Block], demand: Demand, spare_bytes: int, budget_bytes: int) -> MemoryPlacement:
    """The placement that fills the memory which is left beside a pass that keeps nothing."""
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
    """Workspace of attention's backward, and how much of what is left that takes."""
    if not demand.rows:
        return WORKSPACE_BYTES, 0
    rows, length, heads = demand.rows, demand.longest, block.decoder.heads
    usual = Call.of(rows, length, heads, WORKSPACE_BYTES).workspace_bytes(length)
    workspace = Call.of(rows, length, heads, usual + max(0, left)).workspace_bytes(length)
    return max(workspace, WORKSPACE_BYTES), workspace - usual
