"""Passes of fixed launches, recorded as CUDA graphs: a host takes longer to launch one than a GPU to run it.

A pass of each key is launched some times first, in which libraries set themselves up and kernels are compiled. All
graphs share one pool of memory, so what a pass returns holds until the next one, of whatever key. Where a pass cannot
be captured (it reads a value on the host, or memory is short), no more are until `clear`: they are launched each time.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from veneer.config.notify import notify

T = TypeVar("T")


class Recordings:
    """CUDA graphs of passes, by their keys.

    Args:
        warmup: Passes of a key that are launched before it is captured.
    """

    def __init__(self, warmup: int) -> None:
        self._warmup, self._launched = warmup, Counter[Hashable]()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None
        self._captures = True

    def __len__(self) -> int:
        return len(self._recorded)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._recorded)

    def clear(self) -> None:
        """Forget all: what they read has moved, or other kernels have to be compiled."""
        self._recorded.clear()
        self._launched.clear()
        self._pool, self._captures = None, True

    def run(self, key: Hashable, launch: Callable[[], T]) -> T:
        """Return what a pass returns.

        Args:
            key: Facts that its launches depend on.
            launch: Function that launches it.
        """
        if key not in self._recorded:
            self._launched[key] += 1
            if not self._captures or self._launched[key] <= self._warmup or not self._capture(key, launch):
                return launch()
        graph, result = self._recorded[key]
        graph.replay()
        found: T = result
        return found

    def _capture(self, key: Hashable, launch: Callable[[], Any]) -> bool:
        """Capture a pass; return whether that was possible."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = launch()
        except RuntimeError as error:  # ending the capture fails too, in place of the error that spoiled it
            torch.cuda.set_stream(stream)
            # The allocator of PyTorch before pull request 180395 goes on as if capturing.
            with suppress(RuntimeError):
                torch.cuda.memory._cuda_endAllocateToPool(stream.device_index, self._pool)  # type: ignore[attr-defined]
            self._captures = False
            reason = str(error.__context__ or error).split("\n")[0]
            notify(f"a pass cannot be recorded as a CUDA graph, and is launched each time, which is slower: {reason}")
            return False
        self._recorded[key] = graph, result
        return True
