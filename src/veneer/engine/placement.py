"""Where a training step's tensors are: one frozen value that a policy writes, blocks read, and plans print.

Two kinds of tensors have a choice. An activation that backward needs is kept from forward to backward, or recomputed,
or brought to the host's memory and back. A frozen weight in 4 bits is dequantized whenever it is used, or once and for
good, or streamed from the host. What makes the choice is a policy (`engine/fused/policy.py`), here are only its words.

Not here: trained weights and the optimizer's states, which stay where they are; 16-bit weights, which have no choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import groupby
from typing import Any


class ActivationState(StrEnum):
    """What happens to an activation between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    HOST = "host"


class WeightState(StrEnum):
    """How a frozen 4-bit weight is held: as stored, in 16 bits as well, or on the host."""

    NF4 = "nf4"
    DEQUANTIZED = "dequantized"
    STREAMED = "streamed"


NOT_IMPLEMENTED = (ActivationState.HOST, WeightState.STREAMED)


@dataclass(frozen=True)
class BlockPlacement:
    """Where one decoder block's tensors are.

    Attributes:
        activations: state of each activation that backward needs, by name.
        weights: state of each frozen 4-bit weight, by name; one that is not named stays as it is.
    """

    activations: Mapping[str, ActivationState]
    weights: Mapping[str, WeightState] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((frozenset(self.activations.items()), frozenset(self.weights.items())))

    @cached_property
    def kept(self) -> frozenset[str]:
        """Names of the activations that are kept."""
        return frozenset(name for name, state in self.activations.items() if state == ActivationState.KEEP)


@dataclass(frozen=True)
class MemoryPlacement:
    """Where all blocks' tensors are, and what that takes.

    Attributes:
        blocks: placement of each block, in the model's order.
        workspace_bytes: memory that the backward of attention may take on its way.
        records_passes: whether passes of a shape that comes again are recorded; they hold their memory for good.
        bytes: what the placement adds to the peak of a step that keeps nothing; 0: nobody chose it by its size.
        least_bytes: that peak, measured or predicted; 0: not known.
        budget_bytes: what the device has for all of it; 0: not known.
    """

    blocks: tuple[BlockPlacement, ...]
    workspace_bytes: int = 0
    records_passes: bool = False
    bytes: int = 0
    least_bytes: int = 0
    budget_bytes: int = 0

    def require_implemented(self) -> None:
        """Raises NotImplementedError, with block and tensor, for a state that no engine implements yet."""
        for number, block in enumerate(self.blocks):
            for name, state in (*block.activations.items(), *block.weights.items()):
                if state in NOT_IMPLEMENTED:
                    raise NotImplementedError(f"block {number}, {name}: no engine implements the state {state.name}")

    def as_dict(self) -> dict[str, Any]:
        """The placement as JSON, blocks that follow each other and are alike as one entry."""
        blocks, first = [], 0
        for block, alike in groupby(self.blocks):
            count = len(list(alike))
            states = {"activations": dict(block.activations), "weights": dict(block.weights)}
            blocks.append({"first": first, "count": count} | states)
            first += count
        return vars(self) | {"blocks": blocks}


def whole_blocks(depth: int, gradient_checkpointing: bool | str) -> MemoryPlacement:
    """The placement of Transformers' own gradient checkpointing: every block is recomputed whole, or none is.

    Args:
        depth: number of blocks.
        gradient_checkpointing: the setting; auto recomputes.
    """
    state = ActivationState.KEEP if gradient_checkpointing is False else ActivationState.RECOMPUTE
    return MemoryPlacement((BlockPlacement({"activations": state}),) * depth)
