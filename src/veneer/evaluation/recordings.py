"""Passes of fixed launches, recorded as CUDA graphs: a host takes longer to launch one than a GPU to run it.

A pass of each kind is launched some times first, in which libraries set themselves up and kernels are compiled. All
recordings share one pool of memory, so what a pass returns holds until the next one, of whatever kind. Where a pass
cannot be recorded (it reads a value on the host, or memory is short), all are launched each time from then on.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from veneer.config.notify import notify

T = TypeVar("T")


class Recordings:
    """Recorded passes by their kinds.

    Args:
        launched: Passes of a kind that are launched before it is recorded.
    """

    def __init__(self, launched: int) -> None:
        self._least, self._launched = launched, Counter[Hashable]()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._records = True

    def __len__(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Forget all: what they read has moved, or other kernels have to be compiled."""
        self._recorded.clear()
        self._launched.clear()

    def run(self, kind: Hashable, launch: Callable[[], T]) -> T:
        """Return what a pass returns.

        Args:
            kind: What its launches depend on.
            launch: Function that launches it.
        """
        if kind not in self._recorded:
            self._launched[kind] += 1
            if not self._records or self._launched[kind] <= self._least or not self._record(kind, launch):
                return launch()
        graph, result = self._recorded[kind]
        graph.replay()
        found: T = result
        return found

    def _record(self, kind: Hashable, launch: Callable[[], Any]) -> bool:
        """Record a pass; return whether that was possible."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = next((known.pool() for known, _ in self._recorded.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool):
                result = launch()
        except RuntimeError as error:  # ending the recording fails too, in place of the error that spoiled it
            torch.cuda.set_stream(stream)
            self._records = False
            reason = str(error.__context__ or error).split("\n")[0]
            notify(f"a pass cannot be recorded as a CUDA graph, and is launched each time, which is slower: {reason}")
            return False
        self._recorded[kind] = graph, result
        return True
