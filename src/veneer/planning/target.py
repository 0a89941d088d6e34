"""The device that a run is planned for: that of this machine, or a card by its name or memory."""

from dataclasses import dataclass, replace
from math import ceil

import psutil
import torch

from veneer.config import UserError
from veneer.config.sizes import parse_size
from veneer.engine.placement import H100, Rates
from veneer.machine.cards import find_card, parse_budget
from veneer.machine.device import Machine, find_machine
from veneer.machine.speeds import Ceilings, GpuLink, ceilings_of, link_of, load_ceilings, load_link

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
        gpus: number of such GPUs.
        gpu_link: the link between them; None: there is one.
        ranks: number of them on this machine that share the run.
    """

    device: str
    name: str
    budget_bytes: int
    dtype: torch.dtype
    ceilings: Ceilings | None
    has_bfloat16: bool
    capability: int = 8
    host_bytes: int = 2**62
    gpus: int = 1
    gpu_link: GpuLink | None = None
    ranks: int = 1

    @property
    def rates(self) -> Rates:
        """The speeds and the host's memory by which tensors are placed; those of an H100 where none are known."""
        known = self.ceilings
        return (
            Rates(known.half_flops, known.link, self.host_bytes) if known else H100._replace(host_bytes=self.host_bytes)
        )

    def within(self, budget: str) -> "TargetDevice":
        """Return a GPU with no more memory than `train.memory_budget` allows; other devices as they are."""
        size = None if budget == "auto" else parse_size(budget)
        if size is None or self.device != "cuda":
            return self
        name = f"{self.name}, at most {size / 2**30:.1f} GiB taken"
        return replace(self, name=name, budget_bytes=min(self.budget_bytes, size - CONTEXT))


def this_device(machine: Machine | None = None, budget: str = "auto", gpus: int | None = None) -> TargetDevice:
    """Return the device of this machine, with the memory that is free on it now.

    Args:
        machine: the machine; None: this one is examined.
        budget: limit of the memory, as `train.memory_budget`.
        gpus: number of GPUs; None: those that are visible.

    Raises:
        UserError: the device cannot keep to the budget, or is no GPU and several are asked for.
    """
    machine = machine or find_machine()
    _require_budget(budget, machine.device, machine.total_bytes)
    free = machine.free_bytes - (DEFERRED if machine.device == "cuda" else 0)
    name = f"{machine.name}, {machine.free_bytes / 2**30:.1f} of {machine.total_bytes / 2**30:.1f} GiB free"
    card = find_card(machine.name) if machine.device == "cuda" else None
    ceilings = load_ceilings(machine) or (ceilings_of(card) if card else None)
    capability = card.capability // 10 if card else 8
    host = int(PINNED_SHARE * psutil.virtual_memory().available)
    found = TargetDevice(machine.device, name, free, machine.dtype, ceilings, machine.has_bfloat16, capability, host)
    if machine.device != "cuda":
        if gpus is not None and gpus > 1:
            raise UserError(
                f"--gpus {gpus}: this machine has no GPU", f'name the card as well: --gpu "h100" --gpus {gpus}'
            )
        return found
    visible = torch.cuda.device_count()
    found = replace(found, gpus=gpus or visible, ranks=gpus or 1)
    if found.gpus > 1:
        found = replace(found, gpu_link=load_link(machine, visible) or link_of(card))
    return found.within(budget)


def device_named(gpu: str, budget: str = "auto", gpus: int | None = None) -> TargetDevice:
    """Return an otherwise empty GPU, or so many, by its name or its memory; `budget` as for `this_device`.

    Raises:
        UserError: it is neither a known card nor an amount of memory, or it cannot keep to the budget.
    """
    total, card = parse_budget(gpu)
    _require_budget(budget, "cuda", total)
    name = f"{card.name if card else 'a GPU'}, {total / 2**30:.1f} GiB"
    many = gpus or 1
    link = link_of(card) if many > 1 else None
    if card is None:
        found = TargetDevice(
            "cuda", name, total - CONTEXT, torch.bfloat16, None, True, gpus=many, gpu_link=link, ranks=many
        )
        return found.within(budget)
    dtype = torch.bfloat16 if card.has_bfloat16 else torch.float32
    capability = card.capability // 10
    found = TargetDevice(
        *("cuda", name, total - CONTEXT, dtype, ceilings_of(card), card.has_bfloat16, capability),
        gpus=many,
        gpu_link=link,
        ranks=many,
    )
    return found.within(budget)


def least_budget(needed_bytes: int) -> str:
    """Return the smallest `train.memory_budget` for a run that needs so much memory beside CUDA's own."""
    return f"{ceil(10 * (needed_bytes + CONTEXT) / 2**30) / 10}GiB"


def _require_budget(budget: str, device: str, total_bytes: int) -> None:
    """Raise UserError for a budget on a device without one, above the card's memory, or below CUDA's own."""
    size = None if budget == "auto" else parse_size(budget)
    if size is None:
        return
    asked = f"train.memory_budget = {budget}"
    if device != "cuda":
        raise UserError(
            f"{asked}: memory_budget is for CUDA GPUs; this machine trains on its {device.upper()}",
            "leave it out, or set it to auto; `veneer plan --gpu 24GiB` plans for a GPU",
        )
    if size > total_bytes:
        raise UserError(
            f"{asked}: the GPU has {total_bytes // 2**20} MiB",
            f"set it to {total_bytes // 2**20}MiB or less, or to auto, which takes what is free",
        )
    if size <= CONTEXT:
        raise UserError(
            f"{asked}: CUDA alone takes {CONTEXT // 2**20} MiB",
            "set it to more; `veneer plan` says how much the run needs at least",
        )
