"""Loads a model for a GPU that it does not fit: 4-bit weights, embeddings and head stay in the host's memory.

The rest (norms, biases, rotary buffers) goes to the device. Weights of 16 bits are quantized there, one at a time, so
that they are the same to the bit as those of a model that is loaded to the device whole. Where the host's memory is too
short as well, they are written to the cached copy on the way, and the copy is memory-mapped: the system reads
weights when they are used, and drops them when it needs the memory.
"""

import copy
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import psutil
import torch

from veneer.config import UserError
from veneer.machine.ranks import local_size
from veneer.model.handles import Quantizing, handles_of
from veneer.model.locate import BaseSource
from veneer.model.reader import Reader
from veneer.model.shapes import build, shapes_of
from veneer.model.shards import Piece


def quantizing_of(config: Any, settings: dict[str, Any], device: str) -> Quantizing:
    """Return how the weights of a 16-bit checkpoint are quantized on a device.

    Args:
        config: configuration of the model.
        settings: arguments of `from_pretrained`, with a `quantization_config`.
        device: device that quantizes.
    """
    base = build(copy.deepcopy(config), settings["dtype"])
    names = {f"{path}.weight" for path in shapes_of(base).quantizable()}
    inner = {name.removeprefix(f"{base.base_model_prefix}.") for name in names}  # in files of a model without a head
    return Quantizing(settings["quantization_config"], settings["dtype"], device, frozenset(names | inner))


def host_bytes(pieces: Sequence[Piece], quantizing: Quantizing | None = None) -> int:
    """Return the memory of a checkpoint's tensors once they are loaded to the host.

    Args:
        pieces: tensors of the checkpoint.
        quantizing: way in which its weights are quantized; None: they are loaded as they are.
    """
    if quantizing is None:
        return sum(piece.size for piece in pieces)
    constants = 1 + 4 / 256 if quantizing.config.bnb_4bit_use_double_quant else 4  # bytes of a block of 64 weights
    sizes = {True: 0.5 + constants / 64, False: quantizing.dtype.itemsize}
    return int(sum(prod(piece.shape) * sizes[piece.name in quantizing.linears] for piece in pieces))


def fits_host(needed: int) -> bool:
    """Return whether the host has so many bytes of memory available, for each process of a run on several GPUs."""
    return needed * local_size() <= psutil.virtual_memory().available


def short_of_memory(source: BaseSource, needed: int, why: str, fix: str) -> UserError:
    """Return the error for a model that neither the GPU nor the host can hold.

    Args:
        source: base model.
        needed: bytes of host memory that it needs.
        why: reason why it cannot be memory-mapped.
        fix: advice besides a smaller base and closed programs.
    """
    there = psutil.virtual_memory().available
    return UserError(
        f"model.base = {source.name}: its 4-bit weights do not fit the GPU and need {needed / 2**30:.1f} GiB of the "
        f"host's memory, where {there / 2**30:.1f} GiB are available; {why}",
        f"{fix}, close other programs, or name a smaller model.base",
    )


def quantized_tensors(
    pieces: Sequence[Piece], quantizing: Quantizing, ranges: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Quantize a 16-bit checkpoint, and yield names and tensors of the state dict; one weight is held at a time.

    Args:
        pieces: tensors of the checkpoint.
        quantizing: way in which its weights are quantized.
        ranges: dict that gets minimum and maximum of each tensor.
    """
    with Reader(pieces, "cpu") as reader:
        for name, handle in handles_of(pieces, reader, ranges, quantizing).items():
            tensor = handle[...]
            yield name, tensor.data
            if (state := getattr(tensor, "quant_state", None)) is not None:
                for part, constant in state.as_dict(packed=True).items():
                    yield f"{name}.{part}", constant


def move_rest(base: Any, device: str) -> None:
    """Move all of a model but 4-bit weights, embeddings and head to a device, in place."""
    ends = {id(module.weight) for module in (base.get_input_embeddings(), base.get_output_embeddings())}
    for module in base.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in ends and getattr(parameter, "quant_state", None) is None:
                setattr(module, name, torch.nn.Parameter(parameter.to(device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
