"""Offloads activations to pinned host memory between forward and backward, on streams beside the computation's.

A tensor leaves as soon as its block has been computed, and its memory on the device is free again one block later; it
comes back while the block after its own goes backward. So at most two blocks' tensors are on the device, and nothing
waits as long as a block computes for longer than its tensors travel. Whole storages are copied, and views of them made
anew: tensors that share memory travel once.

All waiting is between streams, on the device, in an order that no measurement changes: the same pass gives the same
bits, and memory that is reused has been read before. On a CPU the same code copies without streams.
"""

from collections import deque
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from veneer.engine.fused.pinned import PinnedMemory

SMALL = 64 * 2**10  # bytes; smaller storages stay on the device


@dataclass(frozen=True)
class _View:
    """A tensor's position in its storage."""

    storage: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any


class Offloaded:
    """Tensors on the host: their views, and the sizes of their storages."""

    def __init__(self, key: Hashable, views: Any, sizes: list[int]) -> None:
        self.key, self.views, self.sizes = key, views, sizes
        self.tensors: Any = None  # on their way back
        self.arrival: Any = None


class ActivationStore:
    """Holds activations on the host.

    Args:
        device: device of the activations.
        memory: host memory.
    """

    def __init__(self, device: torch.device, memory: PinnedMemory) -> None:
        self._device, self._memory = device, memory
        self._buffers: dict[Hashable, torch.Tensor] = {}
        self._leaving: deque[tuple[Any, list[torch.Tensor]]] = deque()
        self._out: Any = new_stream(device)
        self._back: Any = new_stream(device)

    def leave(self, key: Hashable, tensors: Any) -> Offloaded:
        """Begin to copy tensors to the host; the caller drops its references.

        Args:
            key: name of the buffers, used again by each pass.
            tensors: tree of tensors and other values.
        """
        storages: dict[int, tuple[int, torch.Tensor]] = {}

        def view(tensor: torch.Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage.nbytes() < SMALL:
                return tensor
            number, _ = storages.setdefault(storage._cdata, (len(storages), tensor))
            return _View(number, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

        views = tree_map_only(torch.Tensor, view, tensors)
        held = [tensor for _, tensor in storages.values()]
        if self._out is not None:
            # It has the tensors then, and all that left before in the same buffers is back.
            self._out.wait_stream(torch.cuda.current_stream(self._device))
        with on_stream(self._out):
            for number, tensor in enumerate(held):
                whole = _bytes_of(tensor)
                self._buffer((key, number), len(whole)).copy_(whole, non_blocking=True)
        self._leaving.append((_event(self._out), held))
        return Offloaded(key, views, [tensor.untyped_storage().nbytes() for tensor in held])

    def release(self, newest: int = 1) -> None:
        """Free the device's memory of tensors that have left, but for the newest, which may still be on their way."""
        while len(self._leaving) > newest:
            event, tensors = self._leaving.popleft()
            if event is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
            tensors.clear()

    def drop(self) -> None:
        """Forget what was leaving when the recording of a pass failed, whose events stand for nothing."""
        self._leaving.clear()

    def fetch(self, offloaded: Offloaded) -> None:
        """Begin to copy tensors back."""
        new = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in offloaded.sizes]
        if self._back is not None:
            self._back.wait_stream(torch.cuda.current_stream(self._device))  # their memory may still be in use
        with on_stream(self._back):
            for number, buffer in enumerate(new):
                buffer.copy_(self._buffers[offloaded.key, number][: len(buffer)], non_blocking=True)
        offloaded.arrival = _event(self._back)
        offloaded.tensors = tree_map_only(
            _View, lambda v: new[v.storage].view(v.dtype).as_strided(v.shape, v.stride, v.offset), offloaded.views
        )

    def take(self, offloaded: Offloaded) -> Any:
        """Return the tensors, on the device; what is computed next waits for them."""
        if offloaded.tensors is None:
            self.fetch(offloaded)
        if offloaded.arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(offloaded.arrival)
        tensors, offloaded.tensors = offloaded.tensors, None
        return tensors

    def _buffer(self, key: Hashable, count: int) -> torch.Tensor:
        if key not in self._buffers or len(self._buffers[key]) < count:
            self._buffers[key] = self._memory.take(count)
        return self._buffers[key][:count]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the whole storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def new_stream(device: torch.device) -> Any:
    """Return a stream of a CUDA device; None: another device has none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Return a context in which copies are made on a stream, if there is one."""
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def _event(stream: Any) -> Any:
    """Return an event after all that a stream has to do; None: there is no stream."""
    return stream.record_event() if stream is not None else None
