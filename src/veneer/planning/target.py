"""The device that a run is planned for: that of this machine, or a card by its name or memory."""

from dataclasses import dataclass

import psutil
import torch

from veneer.engine.placement import H100, Rates
from veneer.machine.cards import find_card, parse_budget
from veneer.machine.device import Machine, find_machine
from veneer.machine.speeds import Ceilings, ceilings_of, load_ceilings

CONTEXT = 790 * 2**20  # memory of a CUDA process beside the allocator's
PINNED_SHARE = 0.7  # of the host's free memory, that may be pinned
DEFERRED = 160 * 2**20  # part of it that is allocated with the first kernels, not with the context


@dataclass(frozen=True)
class TargetDevice:
    """The device that a run is planned for.

    Attributes:
        device: cuda, cpu or mps.
        name: name to display.
        budget_bytes: memory that the run may hold there.
        dtype: default compute dtype.
        ceilings: speeds; None: not known.
        has_bfloat16: whether bfloat16 is fast there.
        capability: major compute capability of a GPU; if not known, that of the GPUs whose attention needs more memory.
        host_bytes: memory of the host that may be pinned.
    """

    device: str
    name: str
    budget_bytes: int
    dtype: torch.dtype
    ceilings: Ceilings | None
    has_bfloat16: bool
    capability: int = 8
    host_bytes: int = 2**62

    @property
    def rates(self) -> Rates:
        """The speeds and the host's memory by which tensors are placed; those of an H100 where none are known."""
        known = self.ceilings
        return (
            Rates(known.half_flops, known.link, self.host_bytes) if known else H100._replace(host_bytes=self.host_bytes)
        )


def this_device(machine: Machine | None = None) -> TargetDevice:
    """Return the device of this machine, with the memory that is free on it now."""
    machine = machine or find_machine()
    free = machine.free_bytes - (DEFERRED if machine.device == "cuda" else 0)
    name = f"{machine.name}, {machine.free_bytes / 2**30:.1f} of {machine.total_bytes / 2**30:.1f} GiB free"
    card = find_card(machine.name) if machine.device == "cuda" else None
    ceilings = load_ceilings(machine) or (ceilings_of(card) if card else None)
    capability = card.capability // 10 if card else 8
    host = int(PINNED_SHARE * psutil.virtual_memory().available)
    return TargetDevice(machine.device, name, free, machine.dtype, ceilings, machine.has_bfloat16, capability, host)


def device_named(gpu: str) -> TargetDevice:
    """Return an otherwise empty GPU by its name or its memory.

    Raises:
        UserError: it is neither a known card nor an amount of memory.
    """
    total, card = parse_budget(gpu)
    name = f"{card.name if card else 'a GPU'}, {total / 2**30:.1f} GiB"
    if card is None:
        return TargetDevice("cuda", name, total - CONTEXT, torch.bfloat16, None, has_bfloat16=True)
    dtype = torch.bfloat16 if card.has_bfloat16 else torch.float32
    return TargetDevice(
        "cuda", name, total - CONTEXT, dtype, ceilings_of(card), card.has_bfloat16, card.capability // 10
    )
