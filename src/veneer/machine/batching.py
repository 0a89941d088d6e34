"""Takes rows in batches where no gradient is needed, and in smaller ones once memory runs out.

What else holds memory nobody foresees, so the number of rows that a plan found may be too large. Rows are computed
independently of each other, so their number at a time changes results by no more than rounding.

Of several ranks each takes whole batches, and all get what every one makes of its own: the shapes, and so the bits, are
those of one process.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from veneer.config import JobError
from veneer.config.notify import notify
from veneer.machine.device import release_memory
from veneer.machine.ranks import ALONE, Ranks

Item = TypeVar("Item")
Result = TypeVar("Result")
# What torch's allocators on the CPU say, and libraries on a GPU; its allocator there raises a class of its own.
MESSAGES = ("can't allocate memory", "out of memory", "not enough memory", "status_alloc_failed")


class Batching:
    """Takes rows in batches, and smaller ones once memory was short.

    Args:
        size: rows in a batch.
        fix: advice where not even one row fits.
        what: result that the rows are taken for, in messages.
        together: consecutive rows that are never parted.
        ranks: this process among those that share the batches; all call `over` together, with the same items.

    Attributes:
        size: current number of rows in a batch.
    """

    def __init__(self, size: int, fix: str, what: str = "answers", together: int = 1, ranks: Ranks = ALONE) -> None:
        self._together = together
        self.ranks = ranks
        self.size = self._whole(size)
        self._fix = fix
        self._what = what
        self._has_notified = False

    def over(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        """Yield what `work` makes of the items, `size` at a time and in order.

        Raises:
            JobError: not even one fits.
        """
        if self.ranks.size == 1:
            yield from self._over(items, work)
            return
        size = self.agree()
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        for results in self.ranks.spread(batches, lambda own: [list(self._over(batch, work)) for batch in own]):
            yield from results
        self.agree()

    def agree(self) -> int:
        """Take as few rows in a batch as any rank does; returns their number."""
        self.size = min(self.ranks.gather(self.size))
        return self.size

    def _over(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        start = 0
        while start < len(items):
            chosen = items[start : start + self.size]
            try:
                result = work(chosen)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                start += len(chosen)
                yield result
                continue
            self._halve(len(chosen))  # out here nothing holds what the failed attempt had made

    def until_done(self, work: Callable[[int], Iterator[Result]], most: int) -> Iterator[Result]:
        """Yield what `work` yields for a number of rows at a time; once memory is short it begins anew with fewer.

        Args:
            work: function of the number of rows; what it has yielded it does not yield again.
            most: rows that there are.

        Raises:
            JobError: not even one fits.
        """
        while True:
            rows = min(self.size, most)
            try:
                yield from work(rows)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(rows)  # out here nothing holds what the failed attempt had made

    def _whole(self, size: int) -> int:
        return max(self._together, size // self._together * self._together)

    def _halve(self, rows: int) -> None:
        if rows <= self._together:
            raise JobError(f"out of memory with one row at a time ({self._what})\n  fix: {self._fix}")
        self.size = self._whole(rows // 2)
        release_memory()
        if not self._has_notified:
            self._has_notified = True
            notify(
                f"out of memory with {rows} rows at a time: continuing with {self.size}, or fewer if needed; the "
                f"{self._what} do not depend on it",
                where="evaluate.batch_size",
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in MESSAGES)
