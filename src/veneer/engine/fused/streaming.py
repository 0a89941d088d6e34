"""Streams frozen 4-bit weights from pinned host memory, one block ahead of the computation.

A block's packed weights and constants are one piece of host memory, so one copy brings them. Two buffers on the device
take turns: while a block is computed from one, the next block's weights, in the pass's direction, arrive in the other.
The last blocks of forward are the first of backward and are not copied again. A block is bound to its buffer, so that
the addresses that kernels read never change.

bitsandbytes' modules keep their weights: these become views of the host's memory, and nothing is stored twice.
Blocks for which no memory is left to pin stay as they were loaded, perhaps memory-mapped, and are copied through pinned
buffers, for which the processor has to wait.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from veneer.engine.fused.group import Group
from veneer.engine.fused.offload import new_stream, on_stream
from veneer.engine.fused.pinned import ALIGNMENT, PinnedMemory
from veneer.kernels.nf4 import PackedNF4

BUFFERS = 2
RESERVE = 2 * 2**30  # bytes of the host's memory that are not pinned


class StreamedWeights:
    """Streams the weights of some blocks.

    Args:
        device: device that computes.
        memory: host memory.
    """

    def __init__(self, device: torch.device, memory: PinnedMemory) -> None:
        self._device, self._memory = device, memory
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
            if number not in self._host:
                self._host[number] = self._to_host(groups)
        for number in set(self._host) - set(groups_by_block):
            del self._host[number]
        self._order, self._groups = list(groups_by_block), groups_by_block
        self._turn = {number: turn for turn, number in enumerate(self._order)}
        largest = max((sum(map(packed_bytes, groups)) for groups in groups_by_block.values()), default=0)
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
                views, start = _laid_out(group.packed, buffer, start)
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
        host, buffer = self._host[self._order[turn]], self._buffers[at]
        if host is None:
            host = self._staged(at, self._groups[self._order[turn]])
        if self._stream is not None:
            # Where no block has been computed from it, it may be memory that is still in use for something else.
            after = self._free[at] or torch.cuda.current_stream(self._device).record_event()
            self._stream.wait_event(after)
        with on_stream(self._stream):
            buffer[: len(host)].copy_(host, non_blocking=True)
            self._arrived[at] = self._stream.record_event() if self._stream is not None else None

    def _to_host(self, groups: Sequence[Group]) -> torch.Tensor | None:
        """Move a block's weights to one piece of pinned memory; None: they stay, since there is no memory to pin."""
        size = sum(map(packed_bytes, groups))
        on_host = groups[0].packed[0].weights.device.type == "cpu"
        if on_host and psutil.virtual_memory().available < size + RESERVE:
            return None
        host = self._memory.take(size)
        for group, views in zip(groups, _copied(groups, host), strict=True):
            group.store(views)
        return host

    def _staged(self, at: int, groups: Sequence[Group]) -> torch.Tensor:
        """Copy a block's weights to the pinned buffer of a turn, once its last copy to the device is done."""
        if at not in self._staging:
            self._staging[at] = self._memory.take(len(self._buffers[at]))
        if self._arrived[at] is not None:
            self._arrived[at].synchronize()
        _copied(groups, self._staging[at])
        return self._staging[at][: sum(map(packed_bytes, groups))]


def _copied(groups: Sequence[Group], buffer: torch.Tensor) -> list[list[PackedNF4]]:
    """Copy the weights of groups to a buffer, one behind the other, and return them as views of it."""
    found, start = [], 0
    for group in groups:
        views, start = _laid_out(group.packed, buffer, start)
        for view, packed in zip(views, group.packed, strict=True):
            for target, source in zip(view.large, packed.large, strict=True):
                target.copy_(source)
        found.append(views)
    return found


def packed_bytes(group: Group) -> int:
    """Return the bytes of a group's packed weights and constants, each aligned; 0: it is not quantized."""
    return sum(_aligned(tensor.nbytes) for packed in group.packed for tensor in packed.large)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _laid_out(matrices: Sequence[PackedNF4], buffer: torch.Tensor, start: int) -> tuple[list[PackedNF4], int]:
    """Return the same matrices as views of a buffer, one behind the other, and the end of the last."""
    found = []
    for packed in matrices:
        views = []
        for tensor in packed.large:
            views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype))
            start += _aligned(tensor.nbytes)
        found.append(packed.with_large(views))
    return found, start
