"""Memory of each rank that the other ranks of its machine read, without its help.

What lies here is written once, before anybody reads it, and never changes. So nobody has to wait for anybody: ranks may
run different numbers of passes, and redo some, as they do where memory runs out. A collective could not do that.

On GPUs it is torch's symmetric memory: each rank maps the memory of the others, and copies from it go over NVLink or
PCIe by the GPUs' copy engines, beside the computation. On a CPU it is a file a rank that all of them map.
"""

import tempfile
import weakref
from typing import Any

import torch

from veneer.config import JobError, UserError
from veneer.machine.ranks import FIRST_WAIT, Ranks

FIX = "leave train.shard out: weights that do not fit a GPU are streamed from the host's memory then"


_made: "weakref.WeakSet[PeerMemory]" = weakref.WeakSet()


def uncounted_bytes() -> int:
    """Return the bytes of this process's GPU that torch's allocator does not count."""
    return sum(memory.uncounted_bytes for memory in _made)


class PeerMemory:
    """Memory of the ranks of a machine.

    Args:
        ranks: this process among those of the run.
        count: bytes of each rank.
        device: device of this process.

    Attributes:
        parts: the memory of each rank of this machine, as uint8 tensors of this process; to read, but for its own.
        own: its own.
        uncounted_bytes: those of its own that torch's allocator does not count.

    Raises:
        UserError: the GPUs cannot read each other's memory.
        torch.OutOfMemoryError: it does not fit.
    """

    def __init__(self, ranks: Ranks, count: int, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        ranks.meet("the base's shards", FIRST_WAIT)  # ranks load at their own pace
        self._handle: Any = None
        self.uncounted_bytes = 0
        _made.add(self)
        self.parts = self._on_gpus(count) if device.type == "cuda" else self._in_files(count)
        self.own = self.parts[ranks.local_rank]

    def is_written(self) -> None:
        """Wait until all ranks have written their memory; called once, before anything is read."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._ranks.meet("the base's shards", FIRST_WAIT)

    def _on_gpus(self, count: int) -> list[torch.Tensor]:
        from torch.distributed._symmetric_memory import empty, rendezvous

        size, own = self._ranks.local_size, torch.cuda.current_device()
        if size > (there := torch.cuda.device_count()):
            raise UserError(f"train.shard = layers: {size} processes run here, and this one sees {there} GPUs", FIX)
        for other in range(size):
            if other != own and not torch.cuda.can_device_access_peer(own, other):
                raise UserError(f"train.shard = layers: GPU {own} cannot read the memory of GPU {other}", FIX)
        counted = torch.cuda.memory_allocated()
        try:
            memory = empty(count, dtype=torch.uint8, device=torch.device("cuda", own))
            self._handle = rendezvous(memory, self._ranks.locals)
            self.uncounted_bytes = max(0, count - (torch.cuda.memory_allocated() - counted))
            return [self._handle.get_buffer(number, (count,), torch.uint8) for number in range(size)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if "out of memory" in reason:
                raise torch.OutOfMemoryError(f"Tried to allocate {count / 2**30:.2f} GiB. ") from error
            raise JobError(
                f"train.shard = layers: the GPUs cannot map each other's memory ({reason})\n  fix: {FIX}"
            ) from error

    def _in_files(self, count: int) -> list[torch.Tensor]:
        ranks = self._ranks
        with tempfile.NamedTemporaryFile(prefix="veneer-shards-") as file:
            file.truncate(count)
            first = ranks.rank - ranks.local_rank
            names = ranks.gather(file.name)[first : first + ranks.local_size]
            parts = [torch.from_file(name, shared=True, size=count, dtype=torch.uint8) for name in names]
            ranks.gather(len(parts))  # all have mapped them: the names may go
        return parts
