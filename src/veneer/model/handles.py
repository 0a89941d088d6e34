"""The entries of a state dict that is not read yet: handles, which Transformers resolves one by one.

Each has the interface of a slice of a safetensors file. What it gives when it is resolved depends on its kind: a tensor
as it is in the file; a 4-bit weight with its constants, of which the file holds six tensors; or a 16-bit weight that is
quantized on a device and copied to the host, so that a model larger than the device can be quantized there. A CPU
may round otherwise, and weights that were quantized for a GPU should not depend on where they are stored.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from veneer.model.shards import DamagedError, Piece

QUANT_STATE = ".quant_state."  # in the names of tensors that bitsandbytes stores beside a 4-bit weight
MOST_PARTS = 6  # tensors of a 4-bit weight in a state dict, with double quantization


class TensorSource(Protocol):
    """What gives a tensor by its name: a `Reader`, or `MappedFiles`."""

    def take(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Quantizing:
    """How 16-bit weights are quantized while they are loaded to the host.

    Attributes:
        config: Transformers' BitsAndBytesConfig.
        dtype: dtype of weights before they are quantized, and of all that are not.
        device: device that quantizes.
        linears: names of the weights to quantize.
        lock: lock that is held while a weight is on the device, since Transformers resolves several handles at a time.
    """

    config: Any
    dtype: torch.dtype
    device: str
    linears: frozenset[str]
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handle:
    """The entry of a tensor that is loaded as it is in the file."""

    def __init__(self, source: TensorSource, piece: Piece, ranges: dict[str, torch.Tensor]) -> None:
        self._source, self._piece, self._ranges = source, piece, ranges

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = self._whole()
        return whole if index is Ellipsis else whole[index]

    def _whole(self) -> torch.Tensor:
        whole = self._source.take(self._piece.name)
        note_range(self._ranges, self._piece.name, whole)
        return whole

    def get_dtype(self) -> str:
        return self._piece.kind

    def get_shape(self) -> list[int]:
        return list(self._piece.shape)


class PackedHandle(Handle):
    """The entry of a 4-bit layer: its packed weight, with its constants."""

    def __init__(
        self, source: TensorSource, piece: Piece, ranges: dict[str, torch.Tensor], beside: Sequence[str]
    ) -> None:
        super().__init__(source, piece, ranges)
        self._beside = beside

    def _whole(self) -> torch.Tensor:
        from bitsandbytes.nn import Params4bit

        packed = super()._whole()
        beside = {name: self._source.take(name) for name in self._beside}
        for name, tensor in beside.items():
            note_range(self._ranges, name, tensor)
        whole: torch.Tensor = Params4bit.from_prequantized(packed, beside, device=packed.device)
        return whole


class CastHandle(Handle):
    """The entry of a tensor beside weights that `QuantizingHandle` quantizes: Transformers does not cast it then."""

    def __init__(
        self, source: TensorSource, piece: Piece, ranges: dict[str, torch.Tensor], quantizing: Quantizing
    ) -> None:
        super().__init__(source, piece, ranges)
        self._quantizing = quantizing

    def _whole(self) -> torch.Tensor:
        whole = super()._whole()
        return whole.to(self._quantizing.dtype) if whole.is_floating_point() else whole


class QuantizingHandle(CastHandle):
    """The entry of a linear layer in 16 bits, which is quantized on the device and copied to the host."""

    def _whole(self) -> torch.Tensor:
        weight = self._source.take(self._piece.name)
        with self._quantizing.lock:
            return self._quantized(weight)

    def _quantized(self, weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.nn import Params4bit

        how = self._quantizing
        on_device = weight.to(how.dtype).to(how.device)
        note_range(self._ranges, self._piece.name, on_device)
        quantized: torch.Tensor = Params4bit(
            on_device,
            requires_grad=False,
            compress_statistics=how.config.bnb_4bit_use_double_quant,
            quant_type=how.config.bnb_4bit_quant_type,
            quant_storage=how.config.bnb_4bit_quant_storage,
        ).to(how.device)
        return quantized.to("cpu")  # with its constants

    def get_dtype(self) -> str:
        return "U8"  # of the result, or Transformers would cast it


def handles_of(
    pieces: Sequence[Piece],
    source: TensorSource,
    ranges: dict[str, torch.Tensor],
    quantizing: Quantizing | None = None,
) -> dict[str, Handle]:
    """Return a handle for each tensor of the model; the handle of a 4-bit weight includes its constants.

    Args:
        pieces: tensors of the checkpoint.
        source: source of the tensors.
        ranges: dict that gets minimum and maximum of each tensor as it is resolved; see `note_range`.
        quantizing: way to quantize the weights of a 16-bit checkpoint; None: tensors are given as they are.

    Raises:
        DamagedError: a 4-bit weight lacks a part.
    """
    if quantizing is not None:
        kinds = {piece.name: QuantizingHandle if piece.name in quantizing.linears else CastHandle for piece in pieces}
        return {piece.name: kinds[piece.name](source, piece, ranges, quantizing) for piece in pieces}
    names = [piece.name for piece in pieces]
    beside: dict[str, list[str]] = {name.partition(QUANT_STATE)[0]: [] for name in names if QUANT_STATE in name}
    for name in names:
        weight = name.partition(QUANT_STATE)[0] if QUANT_STATE in name else name.rpartition(".")[0]
        if weight in beside:
            beside[weight].append(name)
    needed = {weight + ending for weight in beside for ending in ("", ".absmax", ".quant_map")}
    if missing := sorted(needed - set(names)):
        raise DamagedError(f"{pieces[0].file.parent} lacks {missing[0]}, which belongs to a weight in 4 bits")
    parts = {name for several in beside.values() for name in several}
    return {
        piece.name: PackedHandle(source, piece, ranges, beside[piece.name])
        if piece.name in beside
        else Handle(source, piece, ranges)
        for piece in pieces
        if piece.name not in parts
    }


def note_range(ranges: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    """Record the minimum and maximum of a tensor, on its device; both are NaN if it holds one."""
    if tensor.is_floating_point() and tensor.numel():
        ranges[name] = torch.stack(tensor.aminmax()).float()
