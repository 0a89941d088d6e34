"""Reads a base whose files are already in bitsandbytes' 4-bit format, as in `-bnb-4bit` repositories.

Training computes with what these weights are dequantized to, so that is what an adapter is merged into. A weight is
several tensors on disk (packed numbers, constants, tables); here they are one again, which is dequantized when it is
read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from veneer.model.handles import QUANT_STATE
from veneer.model.tuned import TunedModel
from veneer.release.merge.grown import grown
from veneer.release.weights import Stored, bytes_of, weights_of


@dataclass(frozen=True)
class StoredNF4(Stored):
    """A weight in 4 bits; dtype and shape are those of the weight it encodes.

    Attributes:
        parts: Tensors on disk, the packed numbers first.
    """

    parts: tuple[Stored, ...]

    def read(self) -> torch.Tensor:
        """Read the weight, dequantized as training does."""
        from bitsandbytes.functional import dequantize_4bit

        found: torch.Tensor = dequantize_4bit(self.parts[0].read(), _state(self.parts))
        return found.to(self.dtype)

    def chunks(self) -> Iterator[memoryview]:
        yield bytes_of(self.read())


def base_weights(tuned: TunedModel) -> dict[str, Stored]:
    """Return an adapter's base on disk, 4-bit tensors as the weights they encode, with rows for tokens that were added.

    Raises as `weights_of`.
    """
    tensors = weights_of(tuned.base_folder, f"model.base = {tuned.model.base}")
    weights = {name.partition(QUANT_STATE)[0] for name in tensors if QUANT_STATE in name}
    beside: dict[str, list[Stored]] = {name: [] for name in weights}
    for name, stored in tensors.items():
        weight = name.partition(QUANT_STATE)[0] if QUANT_STATE in name else name.rpartition(".")[0]
        if weight in weights:
            beside[weight].append(stored)
    parts = {stored.name for several in beside.values() for stored in several}
    found = {
        name: _packed(stored, beside[name], tuned.dtype) if name in weights else stored
        for name, stored in tensors.items()
        if name not in parts
    }
    return found | grown(tuned, found)


def _packed(packed: Stored, beside: list[Stored], dtype: torch.dtype) -> StoredNF4:
    parts = (packed, *beside)
    return StoredNF4(packed.name, packed.file, dtype, tuple(_state(parts).shape), packed.start, packed.size, parts)


def _state(parts: tuple[Stored, ...]) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict({part.name: part.read() for part in parts[1:]}, device=torch.device("cpu"))
