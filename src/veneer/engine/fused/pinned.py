"""Holds pinned host memory, from which the device copies without the processor's help, at the full speed of its link.

Memory is registered with CUDA in large chunks, once, and never moves: torch's own pinned allocator rounds each request
up to a power of two. Without CUDA the same memory is ordinary, so that all that uses it runs anywhere.
"""

import weakref
from typing import Any

import torch

CHUNK = 256 * 2**20  # bytes registered at a time, or as many as one request needs
ALIGNMENT = 512


class PinnedMemory:
    """Hands out pieces of pinned host memory, which live as long as it does.

    Args:
        device: device that copies from and to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        self._chunks: list[torch.Tensor] = []
        self._left = 0
        if self._pins:
            weakref.finalize(self, _unregister, self._chunks)

    @property
    def bytes(self) -> int:
        """The bytes held."""
        return sum(len(chunk) for chunk in self._chunks)

    def take(self, count: int) -> torch.Tensor:
        """Return so many bytes, as a uint8 tensor.

        Raises:
            torch.OutOfMemoryError: CUDA cannot pin so much.
        """
        size = -(-count // ALIGNMENT) * ALIGNMENT
        if size > self._left:
            self._chunks.append(self._chunk(max(size, CHUNK if self._pins else size)))
            self._left = len(self._chunks[-1])
        chunk = self._chunks[-1]
        start = len(chunk) - self._left
        self._left -= size
        return chunk[start : start + count]

    def _chunk(self, count: int) -> torch.Tensor:
        chunk = torch.empty(count, dtype=torch.uint8)
        if self._pins:
            chunk.zero_()  # in all threads: registering would make the pages in one
            status = int(_runtime().cudaHostRegister(chunk.data_ptr(), count, 0))
            if status:
                raise torch.OutOfMemoryError(f"CUDA could not pin {count / 2**30:.1f} GiB of host memory ({status}). ")
        return chunk


def _unregister(chunks: list[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for chunk in chunks:
        _runtime().cudaHostUnregister(chunk.data_ptr())
    chunks.clear()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
