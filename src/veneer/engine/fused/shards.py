"""Spreads the frozen 4-bit weights of blocks over the GPUs of a machine; each holds an equal part of every block.

A block's packed weights and constants are one piece of memory (streaming.py), which is cut into as many parts as there
are GPUs. Before a block is computed, its parts are copied from where they are into a buffer, one block ahead, as they
are from the host's memory where weights are streamed from there. Adapters are on every GPU.

Parts are bytes: they are never interpreted as a sharded tensor, so nothing of the 4-bit format is converted on the way.
"""

from collections.abc import Sequence

import torch

from veneer.engine.fused.block import Block
from veneer.engine.fused.packed import aligned, block_bytes, copied
from veneer.machine.peers import PeerMemory
from veneer.machine.ranks import Ranks

Pieces = list[tuple[int, torch.Tensor]]  # each with the byte of the block at which it begins


class Shards:
    """The parts of blocks' weights that lie on each GPU; all ranks make it together.

    Args:
        ranks: this process among those of the run.
        device: device that computes.
        blocks: the blocks; this GPU's part is copied from wherever their weights are.
    """

    def __init__(self, ranks: Ranks, device: torch.device, blocks: Sequence[Block]) -> None:
        self._pieces: dict[int, Pieces] = {}
        rank, gpus, at = ranks.local_rank, ranks.local_size, 0
        for block in blocks:
            block.shards = gpus
        memory = PeerMemory(ranks, shard_bytes(blocks), device)
        sizes = {block.number: block_bytes(block.groups) for block in blocks}
        whole = torch.empty(max(sizes.values()), dtype=torch.uint8, device=device)
        for block in blocks:
            size, part = sizes[block.number], _part(block)
            copied(block.groups, whole)
            pieces = []
            for other in (*range(rank, gpus), *range(rank)):  # each begins elsewhere: no GPU is read by all at once
                start, count = other * part, max(0, min(part, size - other * part))
                pieces.append((start, memory.parts[other][at : at + count]))
            pieces[0][1].copy_(whole[rank * part : rank * part + len(pieces[0][1])])
            self._pieces[block.number] = pieces
            at += part
        memory.is_written()
        self._memory = memory

    def __contains__(self, number: int) -> bool:
        return number in self._pieces

    def of(self, number: int) -> Pieces:
        """Return the pieces of a block."""
        return self._pieces[number]


def shard_bytes(blocks: Sequence[Block]) -> int:
    """Return the bytes of blocks that are spread over GPUs which each of these holds."""
    return sum(map(_part, blocks))


def _part(block: Block) -> int:
    return aligned(-(-block_bytes(block.groups) // block.shards))
