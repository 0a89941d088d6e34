"""The placement of a training step's tensors: a frozen value that a policy writes, blocks read, and plans print.

Two kinds of tensors have a choice. An activation that backward needs is kept from forward to backward, or recomputed,
or offloaded to the host's memory. A frozen weight in 4 bits is dequantized for each use, or once and kept, or streamed
from the host; embedding and head may live there too. A policy makes the choice (`engine/fused/policy.py`); this module
only defines its vocabulary. Weights that are spread over GPUs (`train.shard`) are so from the start, and no choice.

Trained weights, the optimizer's states and the other 16-bit weights always stay on the device, and have no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple


class ActivationState(StrEnum):
    """The state of an activation between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    HOST = "host"


class WeightState(StrEnum):
    """The state of a frozen 4-bit weight: as stored, in 16 bits as well, on the host, or spread over GPUs."""

    NF4 = "nf4"
    DEQUANTIZED = "dequantized"
    STREAMED = "streamed"
    SHARDED = "sharded"


@dataclass(frozen=True)
class BlockPlacement:
    """The placement of one decoder block's tensors.

    Attributes:
        activations: state of each activation that backward needs, by name; `x`, the block's input, is never recomputed.
        weights: state of each frozen 4-bit weight, by name; others stay as they are.
    """

    activations: Mapping[str, ActivationState]
    weights: Mapping[str, WeightState] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((frozenset(self.activations.items()), frozenset(self.weights.items())))

    @cached_property
    def kept(self) -> frozenset[str]:
        """The names of the activations that are kept, but for the block's input."""
        return self._in(ActivationState.KEEP) - {"x"}

    @cached_property
    def hosted(self) -> frozenset[str]:
        """The names of the activations that are offloaded to the host."""
        return self._in(ActivationState.HOST)

    @cached_property
    def streams(self) -> bool:
        """Whether its 4-bit weights are streamed from the host."""
        return WeightState.STREAMED in self.weights.values()

    def on_device(self) -> "BlockPlacement":
        """Return the placement that computes the same with everything on the device."""
        activations = {n: ActivationState.KEEP if s == ActivationState.HOST else s for n, s in self.activations.items()}
        weights = {n: WeightState.NF4 if s == WeightState.STREAMED else s for n, s in self.weights.items()}
        return BlockPlacement(activations, weights)

    def _in(self, state: ActivationState) -> frozenset[str]:
        return frozenset(name for name, found in self.activations.items() if found == state)


class Rates(NamedTuple):
    """The speeds and the host's memory by which a policy weighs one choice against another.

    Attributes:
        flops: operations a second of large products.
        link: bytes a second from or to the host, each way.
        host_bytes: memory of the host that may be pinned.
    """

    flops: float
    link: float
    host_bytes: int = 2**62


H100 = Rates(690e12, 52e9)


class Choice(NamedTuple):
    """One choice of a placement, as a person reads it.

    Attributes:
        tensor: the kind of tensor.
        state: its state.
        blocks: number of blocks it holds for.
        bytes: memory of the device that it takes.
        host_bytes: pinned memory of the host that it takes.
        seconds: time of a micro-batch that it saves; negative: that it costs.
    """

    tensor: str
    state: str
    blocks: int
    bytes: int
    host_bytes: int
    seconds: float


@dataclass(frozen=True)
class MemoryPlacement:
    """The placement of all blocks' tensors, and its memory.

    Attributes:
        blocks: placement of each block, in the model's order.
        workspace_bytes: workspace that the backward of attention may take.
        records_passes: whether passes of a shape that recurs are recorded; they never free their memory.
        bytes: memory that it adds to the peak of a step that keeps nothing, negative where the host takes what such a
            step holds on the device; 0: it was not chosen by its size.
        least_bytes: that peak, measured or predicted; 0: not known.
        budget_bytes: memory of the device; 0: not known.
        streams_ends: whether embedding and head live on the host.
        host_bytes: pinned memory of the host.
        link_seconds: time that copies from and to the host add to a micro-batch.
        choices: the choices, with what each takes and saves.
    """

    blocks: tuple[BlockPlacement, ...]
    workspace_bytes: int = 0
    records_passes: bool = False
    bytes: int = 0
    least_bytes: int = 0
    budget_bytes: int = 0
    streams_ends: bool = False
    host_bytes: int = 0
    link_seconds: float = 0.0
    choices: tuple[Choice, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of a step's forward and backward passes; 0: not known."""
        return self.least_bytes + self.bytes if self.least_bytes else 0

    @property
    def streams(self) -> bool:
        """Whether any weight is streamed from the host."""
        return self.streams_ends or any(block.streams for block in self.blocks)

    @property
    def needs_host(self) -> bool:
        """Whether any tensor lives on the host."""
        return self.streams or any(block.hosted for block in self.blocks)

    def describe(self) -> str:
        """Describe in a few words what is kept and what is on the host."""
        kept, hosted = (sum(map(len, names)) for names in zip(*((b.kept, b.hosted) for b in self.blocks), strict=True))
        streamed = sum(block.streams for block in self.blocks)
        return f"{kept} activations kept, {hosted} on the host, weights of {streamed} blocks streamed"

    def as_dict(self) -> dict[str, Any]:
        """Return the placement as JSON, with one entry for consecutive blocks that are alike."""
        blocks, first = [], 0
        for block, alike in groupby(self.blocks):
            count = len(list(alike))
            states = {"activations": dict(block.activations), "weights": dict(block.weights)}
            blocks.append({"first": first, "count": count} | states)
            first += count
        choices = [choice._asdict() for choice in self.choices]
        return vars(self) | {"blocks": blocks, "choices": choices, "peak_bytes": self.peak_bytes}


def whole_blocks(depth: int, gradient_checkpointing: bool | str) -> MemoryPlacement:
    """Return the placement of Transformers' own gradient checkpointing: all blocks are recomputed, or none.

    Args:
        depth: number of blocks.
        gradient_checkpointing: the setting; auto recomputes.
    """
    state = ActivationState.KEEP if gradient_checkpointing is False else ActivationState.RECOMPUTE
    return MemoryPlacement((BlockPlacement({"activations": state}),) * depth)
