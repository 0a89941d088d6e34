"""The device that a run is planned for: the one at hand, or a card by its name or memory."""

from dataclasses import dataclass

import torch

from veneer.machine.cards import find_card, parse_budget
from veneer.machine.device import Machine, find_machine
from veneer.machine.speeds import Ceilings, ceilings_of, kept_ceilings

CONTEXT = 790 * 2**20  # of a CUDA process, beside what the allocator has
LATER = 160 * 2**20  # of that, what comes only with work: a context that is there already has the rest


@dataclass(frozen=True)
class TargetDevice:
    """The device that a run is planned for.

    Attributes:
        device: cuda, cpu or mps.
        name: its name, for a person.
        budget_bytes: memory that the run may hold there.
        dtype: compute dtype where the run leaves it open.
        ceilings: its speeds; None: not known.
        has_bfloat16: whether bfloat16 is fast there.
        capability: major compute capability of a GPU; where it is not known, one whose attention needs more memory.
    """

    device: str
    name: str
    budget_bytes: int
    dtype: torch.dtype
    ceilings: Ceilings | None
    has_bfloat16: bool
    capability: int = 8


def this_device(machine: Machine | None = None) -> TargetDevice:
    """The device of this machine, with the memory that is free on it now."""
    machine = machine or find_machine()
    free = machine.free_bytes - (LATER if machine.device == "cuda" else 0)
    name = f"{machine.name}, {machine.free_bytes / 2**30:.1f} of {machine.total_bytes / 2**30:.1f} GiB free"
    card = find_card(machine.name) if machine.device == "cuda" else None
    ceilings = kept_ceilings(machine) or (ceilings_of(card) if card else None)
    capability = card.capability // 10 if card else 8
    return TargetDevice(machine.device, name, free, machine.dtype, ceilings, machine.has_bfloat16, capability)


def device_named(gpu: str) -> TargetDevice:
    """A GPU by its name or its memory, with nothing else on it.

    Raises:
        UserError: an unknown card, or no amount of memory.
    """
    total, card = parse_budget(gpu)
    name = f"{card.name if card else 'a GPU'}, {total / 2**30:.1f} GiB"
    if card is None:
        return TargetDevice("cuda", name, total - CONTEXT, torch.bfloat16, None, has_bfloat16=True)
    dtype = torch.bfloat16 if card.has_bfloat16 else torch.float32
    return TargetDevice(
        "cuda", name, total - CONTEXT, dtype, ceilings_of(card), card.has_bfloat16, card.capability // 10
    )
