"""Streams frozen 4-bit weights from pinned host memory or other GPUs, one block ahead of the computation.

A block's packed weights and constants are one piece of host memory, so one copy brings them. Two buffers on the device
take turns: while a block is computed from one, the next block's weights, in the pass's direction, arrive in the other.
The last blocks of forward are the first of backward and are not copied again. A block is bound to its buffer, so that
the addresses that kernels read never change.

bitsandbytes' modules keep their weights: these become views of the host's memory, and nothing is stored twice.
Blocks for which no memory is left to pin stay as they were loaded, perhaps memory-mapped, and are copied through pinned
buffers, for which the processor has to wait. Those that are spread over GPUs (shards.py) arrive in pieces.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from veneer.engine.fused.block import Block
from veneer.engine.fused.group import Group
from veneer.engine.fused.offload import new_stream, on_stream
from veneer.engine.fused.packed import block_bytes, copied, laid_out
from veneer.engine.fused.pinned import PinnedMemory
from veneer.engine.fused.shards import Pieces, Shards

BUFFERS = 2
RESERVE = 2 * 2**30  # bytes of the host's memory that are not pinned


class StreamedWeights:
    """Streams the weights of some blocks.

    Args:
        device: device that computes.
        memory: host memory.
        shards: weights of blocks that are spread over GPUs; None: there are none.
    """

    def __init__(self, device: torch.device, memory: PinnedMemory, shards: Shards | None = None) -> None:
        self._device, self._memory, self._shards = device, memory, shards
        self._stream: Any = new_stream(device)
        self._host: dict[int, torch.Tensor | None] = {}  # by block; None: not pinned
        self._groups: Mapping[int, Sequence[Group]] = {}
        self._staging: dict[int, torch.Tensor] = {}  # by buffer
        self._order: list[int] = []  # blocks that are streamed
        self._turn: dict[int, int] = {}
        self._buffers: list[torch.Tensor] = []
        self._content: list[int | None] = [None] * BUFFERS
        self._arrived: list[Any] = [None] * BUFFERS
        self._free: list[Any] = [None] * BUFFERS

    def stream(self, groups_by_block: Mapping[int, Sequence[Group]]) -> None:
        """Stream the weights of these blocks, and no others.

        Args:
            groups_by_block: quantized groups of each block, in the model's order.
        """
        for number, groups in groups_by_block.items():
            if number not in self._host and not self._is_sharded(number):
                self._host[number] = self._to_host(groups)
        for number in set(self._host) - set(groups_by_block):
            del self._host[number]
        self._order, self._groups = list(groups_by_block), groups_by_block
        self._turn = {number: turn for turn, number in enumerate(self._order)}
        largest = max(map(block_bytes, groups_by_block.values()), default=0)
        self._content = [None] * BUFFERS
        if not self._order:
            self._buffers = []
            return
        if not self._buffers or len(self._buffers[0]) < largest:
            self._buffers = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(BUFFERS)]
            self._free = [None] * BUFFERS
        for number, groups in groups_by_block.items():
            buffer, start = self._buffers[self._turn[number] % BUFFERS], 0
            for group in groups:
                views, start = laid_out(group.packed, buffer, start)
                group.use(views)

    def enter(self, number: int, direction: int) -> None:
        """Wait for a block's weights, and begin to copy the next block's.

        Args:
            number: the block that is computed next.
            direction: 1 in forward, -1 in backward.
        """
        turn = self._turn.get(number)
        if turn is None:
            return
        self._copy(turn)
        arrived = self._arrived[turn % BUFFERS]
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        if 0 <= turn + direction < len(self._order):
            self._copy(turn + direction)

    def leave(self, number: int) -> None:
        """Note that a block has been computed; its buffer may be overwritten after it."""
        turn = self._turn.get(number)
        if turn is not None and self._stream is not None:
            self._free[turn % BUFFERS] = torch.cuda.current_stream(self._device).record_event()

    def _copy(self, turn: int) -> None:
        at = turn % BUFFERS
        if self._content[at] == turn:
            return
        self._content[at] = turn
        pieces, buffer = self._pieces(at, self._order[turn]), self._buffers[at]
        if self._stream is not None:
            # Where no block has been computed from it, it may be memory that is still in use for something else.
            after = self._free[at] or torch.cuda.current_stream(self._device).record_event()
            self._stream.wait_event(after)
        with on_stream(self._stream):
            for start, piece in pieces:
                buffer[start : start + len(piece)].copy_(piece, non_blocking=True)
            self._arrived[at] = self._stream.record_event() if self._stream is not None else None

    def _is_sharded(self, number: int) -> bool:
        return self._shards is not None and number in self._shards

    def _pieces(self, at: int, number: int) -> Pieces:
        """Return what a block's weights are copied from, for the buffer of a turn."""
        if self._shards is not None and number in self._shards:
            return self._shards.of(number)
        host = self._host[number]
        return [(0, self._staged(at, self._groups[number]) if host is None else host)]

    def _to_host(self, groups: Sequence[Group]) -> torch.Tensor | None:
        """Move a block's weights to one piece of pinned memory; None: they stay, since there is no memory to pin."""
        size = block_bytes(groups)
        on_host = groups[0].packed[0].weights.device.type == "cpu"
        if on_host and psutil.virtual_memory().available < size + RESERVE:
            return None
        host = self._memory.take(size)
        for group, views in zip(groups, copied(groups, host), strict=True):
            group.store(views)
        return host

    def _staged(self, at: int, groups: Sequence[Group]) -> torch.Tensor:
        """Copy a block's weights to the pinned buffer of a turn, once its last copy to the device is done."""
        if at not in self._staging:
            self._staging[at] = self._memory.take(len(self._buffers[at]))
        if self._arrived[at] is not None:
            self._arrived[at].synchronize()
        copied(groups, self._staging[at])
        return self._staging[at][: block_bytes(groups)]


def buffer_bytes(blocks: Sequence[Block]) -> int:
    """Return the bytes of the buffers on the device through which blocks are streamed."""
    return BUFFERS * max((block_bytes(block.groups) for block in blocks), default=0)
