"""The processes of a run on several GPUs: which one this is, and what they exchange.

torchrun starts one process a GPU (`veneer train --gpus N` starts it: launch.py), and says in the environment which rank
each is. In training each holds the whole model and they exchange gradients, and little else; with `train.shard: layers`
the frozen weights are spread over them, and each reads the others' memory (peers.py). In an evaluation they exchange
what each has found of its rows. NCCL carries tensors of a GPU; gloo carries what the hosts exchange, and all of it
where there is no GPU.

A rank that dies is found by torchrun, which ends the others. A rank that hangs is found here: before they exchange
gradients all ranks meet at a barrier that knows who is missing, and that waits for a bounded time.

Of a run of one process, everything here is the identity.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from veneer.config import JobError

Item = TypeVar("Item")
Value = TypeVar("Value")
ANY_LONG = timedelta(days=7)  # for what may take long on a single rank, as generated answers and files do
LOST = "the exchange with the other ranks broke off"
FIRST_WAIT = 900.0  # seconds that ranks wait for each other while they load and compile
LARGE_BYTES = 2**25  # a tensor from here on is exchanged by itself; smaller ones are laid together


class LostRankError(JobError):
    """Another rank is gone, or a rank does not come; why is known there."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: number of this process, from 0; the first one alone writes and prints.
        size: number of processes.
        hosts: torch's group for what the hosts exchange; None: of a run of one process.
        local_rank, local_size: the same as rank and size among the processes on this machine.
    """

    rank: int = 0
    size: int = 1
    hosts: Any = None
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @cached_property
    def locals(self) -> Any:
        """torch's group of the ranks on this machine; all ranks ask for it together."""
        if self.local_size == self.size:
            return dist.group.WORLD
        return dist.new_subgroups(self.local_size)[0]  # type: ignore[no-untyped-call]

    def meet(self, where: str, seconds: float) -> None:
        """Wait until all ranks are here.

        Args:
            where: the place, for messages.
            seconds: time that the first rank waits for the others.

        Raises:
            LostRankError: some are not here in time; the first rank names them.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.hosts, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+) failed", str(error)) if self.is_first else None
            who = f"rank {missing[1].strip()} is" if missing else "others are"
            raise LostRankError(
                f"{who} not at {where}, {seconds:.0f} s after rank {self.rank}\n  fix: see what hangs there "
                "(nvidia-smi, py-spy dump), then go on from the last checkpoint with --resume"
            ) from error

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Add tensors up over all ranks, in place; all ranks get the same bits.

        Small ones are laid into one buffer a dtype, so that a few exchanges carry them all.
        """
        if self.size == 1 or not tensors:
            return
        small: dict[torch.dtype, list[torch.Tensor]] = {}
        with _exchange():
            for tensor in tensors:
                if tensor.nbytes >= LARGE_BYTES and tensor.is_contiguous():
                    dist.all_reduce(tensor)
                else:
                    small.setdefault(tensor.dtype, []).append(tensor)
            for group in small.values():
                flat = torch.cat([tensor.reshape(-1) for tensor in group])
                dist.all_reduce(flat)
                for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give all ranks the first one's tensors, in place."""
        if self.size == 1:
            return
        with _exchange():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value, by rank; it must be one that pickles, and comes from this run's own processes."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(found, value, group=self.hosts)
        return found

    def spread(self, items: Sequence[Item], measure: Callable[[Sequence[Item]], Sequence[Value]]) -> list[Value]:
        """Return a value of each item, in their order, where each rank measures its share of them.

        Args:
            items: the items, the same on every rank.
            measure: function that returns a value of each item that it is given.
        """
        if self.size == 1:
            return list(measure(items))
        shares = self.gather(list(measure(items[self.rank :: self.size])))
        return [shares[number % self.size][number // self.size] for number in range(len(items))]

    def first(self, compute: Callable[[], Value]) -> Value:
        """Return what the first rank computes, which the others wait for."""
        if self.size == 1:
            return compute()
        held: list[Any] = [compute() if self.is_first else None]
        with _exchange():
            dist.broadcast_object_list(held, 0, group=self.hosts)
        value: Value = held[0]
        return value


ALONE = Ranks()
_joined: list[Ranks] = []  # this process, once it has joined the others


@contextmanager
def _exchange() -> Iterator[None]:
    """Make the error of an exchange that broke off a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(f"{LOST} ({str(error).splitlines()[0]})") from error


def join_ranks() -> Ranks:
    """Return this process among those that torchrun has started; or a run of one.

    The first call begins the exchange, so that all of them make it together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if dist.is_initialized() and _joined:
        return _joined[0]
    if not dist.is_initialized():
        has_gpus = torch.cuda.is_available()
        if has_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("nccl" if has_gpus else "gloo", timeout=ANY_LONG)
    hosts = dist.new_group(backend="gloo", timeout=ANY_LONG)
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", rank % local_size()))
    _joined[:] = [Ranks(rank, size, hosts, local_rank, local_size())]
    return _joined[0]


def local_size() -> int:
    """Return the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def leave_ranks() -> None:
    """End the exchange, where there is one."""
    _joined.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
