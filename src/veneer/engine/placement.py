"""The placement of a training step's tensors: a frozen value that a policy writes, blocks read, and plans print.

Two kinds of tensors have a choice. An activation that backward needs is kept from forward to backward, or recomputed,
or offloaded to the host's memory. A frozen weight in 4 bits is dequantized for each use, or once and kept, or streamed
from the host. A policy makes the choice (`engine/fused/policy.py`); this module only defines its vocabulary.

Trained weights, the optimizer's states and 16-bit weights always stay on the device, and have no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import groupby
from typing import Any


class ActivationState(StrEnum):
    """The state of an activation between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    HOST = "host"


class WeightState(StrEnum):
    """The state of a frozen 4-bit weight: as stored, in 16 bits as well, or on the host."""

    NF4 = "nf4"
    DEQUANTIZED = "dequantized"
    STREAMED = "streamed"


NOT_IMPLEMENTED = (ActivationState.HOST, WeightState.STREAMED)


@dataclass(frozen=True)
class BlockPlacement:
    """The placement of one decoder block's tensors.

    Attributes:
        activations: state of each activation that backward needs, by name.
        weights: state of each frozen 4-bit weight, by name; others stay as they are.
    """

    activations: Mapping[str, ActivationState]
    weights: Mapping[str, WeightState] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((frozenset(self.activations.items()), frozenset(self.weights.items())))

    @cached_property
    def kept(self) -> frozenset[str]:
        """The names of the activations that are kept."""
        return frozenset(name for name, state in self.activations.items() if state == ActivationState.KEEP)


@dataclass(frozen=True)
class MemoryPlacement:
    """The placement of all blocks' tensors, and its memory.

    Attributes:
        blocks: placement of each block, in the model's order.
        workspace_bytes: workspace that the backward of attention may take.
        records_passes: whether passes of a shape that recurs are recorded; they never free their memory.
        bytes: memory that it adds to the peak of a step that keeps nothing; 0: it was not chosen by its size.
        least_bytes: that peak, measured or predicted; 0: not known.
        budget_bytes: memory of the device; 0: not known.
    """

    blocks: tuple[BlockPlacement, ...]
    workspace_bytes: int = 0
    records_passes: bool = False
    bytes: int = 0
    least_bytes: int = 0
    budget_bytes: int = 0

    def require_implemented(self) -> None:
        """Raise NotImplementedError, with block and tensor, for a state that no engine implements yet."""
        for number, block in enumerate(self.blocks):
            for name, state in (*block.activations.items(), *block.weights.items()):
                if state in NOT_IMPLEMENTED:
                    raise NotImplementedError(f"block {number}, {name}: no engine implements the state {state.name}")

    def as_dict(self) -> dict[str, Any]:
        """Return the placement as JSON, with one entry for consecutive blocks that are alike."""
        blocks, first = [], 0
        for block, alike in groupby(self.blocks):
            count = len(list(alike))
            states = {"activations": dict(block.activations), "weights": dict(block.weights)}
            blocks.append({"first": first, "count": count} | states)
            first += count
        return vars(self) | {"blocks": blocks}


def whole_blocks(depth: int, gradient_checkpointing: bool | str) -> MemoryPlacement:
    """Return the placement of Transformers' own gradient checkpointing: all blocks are recomputed, or none.

    Args:
        depth: number of blocks.
        gradient_checkpointing: the setting; auto recomputes.
    """
    state = ActivationState.KEEP if gradient_checkpointing is False else ActivationState.RECOMPUTE
    return MemoryPlacement((BlockPlacement({"activations": state}),) * depth)
