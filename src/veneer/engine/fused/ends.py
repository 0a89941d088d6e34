"""Holds the embedding and the head of a model: on the device, or in pinned host memory.

On the host, an embedding needs no copy: the device reads the rows it looks up. The head is copied for each pass, when
it is needed, and freed before the blocks go backward; its memory is usually less than what these need.
"""

import torch

from veneer.engine.fused.decoder import Decoder
from veneer.engine.fused.pinned import PinnedMemory
from veneer.kernels.gather_rows import gather_rows


class Ends:
    """The two ends of a decoder.

    Args:
        decoder: the decoder, whose modules keep their weights, wherever these are.
        memory: host memory.
    """

    def __init__(self, decoder: Decoder, memory: PinnedMemory) -> None:
        self._decoder, self._memory = decoder, memory
        self._on_host = False

    @property
    def bytes(self) -> int:
        """The bytes of both weights, counted once where they are tied."""
        return sum(weight.nbytes for weight in self._weights())

    def place(self, on_host: bool) -> None:
        """Move both weights to the host or to the device."""
        for weight in self._weights():
            if on_host and not self._on_host:
                pinned = self._memory.take(weight.nbytes).view(weight.dtype).view(weight.shape)
                pinned.copy_(weight.data)
                weight.data = pinned
            elif not on_host and weight.device != self._decoder.device:
                weight.data = weight.data.to(self._decoder.device)
        self._on_host = on_host

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens, on the device."""
        embed = self._decoder.embed
        if not self._on_host:
            embedded: torch.Tensor = embed(ids_T)
            return embedded
        rows_TD = gather_rows(embed.weight, ids_T)
        scale = getattr(embed, "embed_scale", None)  # Gemma's
        return rows_TD if scale is None else rows_TD * scale.to(rows_TD.dtype)

    def head(self) -> torch.Tensor:
        """Return the head's weight, on the device."""
        weight: torch.Tensor = self._decoder.head.weight
        return weight.to(self._decoder.device, non_blocking=True) if self._on_host else weight

    def _weights(self) -> list[torch.nn.Parameter]:
        embed, head = self._decoder.embed.weight, self._decoder.head.weight
        return [embed] if embed is head else [embed, head]
