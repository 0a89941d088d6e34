"""Keys and values of prompts that were read before, so that what two prompts begin with is read once.

They depend on the tokens and on every weight that read them. So each block of tokens has a key that is a hash of all
tokens up to its end and of base and adapter: another adapter, or the same name with other weights, finds nothing. The
blocks that were used longest ago make room for new ones.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch

BLOCK = 32  # tokens


class Block(NamedTuple):
    """Keys and values of one block, in one tensor: as many small ones they would leave a heap in pieces.

    Attributes:
        data: Keys and values of the first layer, of the second, and so on.
        shapes: [heads, BLOCK, width] of each of these.
    """

    data: torch.Tensor
    shapes: tuple[torch.Size, ...]

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the keys and values of each layer."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = [part.view(shape) for part, shape in zip(torch.split(self.data, sizes), self.shapes, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))


class PrefixCache:
    """Blocks by their keys.

    Args:
        most_bytes: Most bytes to hold; 0: it holds nothing.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._blocks = most_bytes, OrderedDict[bytes, Block]()
        self.bytes = 0

    def find(self, owner: str, prompt: Sequence[int]) -> list[Block]:
        """Return the blocks that a prompt begins with, at most up to the token before its last."""
        keys = list(takewhile(self._blocks.__contains__, self._keys(owner, prompt)))
        self._touch(keys)
        return [self._blocks[key] for key in keys]

    def keep(
        self, owner: str, prompt: Sequence[int], layers: Sequence[tuple[torch.Tensor, torch.Tensor]], known: int
    ) -> None:
        """Keep a prompt's blocks.

        Args:
            owner: Hash of base and adapter.
            prompt: Token ids.
            layers: Keys and values of a layer, each [heads, tokens, width], of which copies are kept.
            known: Blocks at the beginning that were found, and need not be copied.
        """
        keys = self._keys(owner, prompt)
        for number, key in enumerate(keys):
            if number < known or key in self._blocks:
                continue
            part = slice(number * BLOCK, (number + 1) * BLOCK)
            pieces = [tensor[:, part] for pair in layers for tensor in pair]
            block = Block(torch.cat([piece.flatten() for piece in pieces]), tuple(piece.shape for piece in pieces))
            if block.bytes > self._most:
                return
            self._blocks[key] = block
            self.bytes += block.bytes
        self._touch(keys)
        while self.bytes > self._most:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= oldest.bytes

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
        self.bytes = 0

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Note that a prompt's blocks were used, the first as the last: without it the others are of no use."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _keys(self, owner: str, prompt: Sequence[int]) -> list[bytes]:
        """Return the key of each whole block before a prompt's last token."""
        if not self._most:
            return []
        key, keys = hashlib.sha256(owner.encode()).digest(), []
        for start in range(0, (len(prompt) - 1) // BLOCK * BLOCK, BLOCK):
            key = hashlib.sha256(key + array("q", prompt[start : start + BLOCK]).tobytes()).digest()
            keys.append(key)
        return keys
