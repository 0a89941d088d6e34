"""The documents of a packed batch, as attention within them needs them, and the keys that they share.

The prompt of a pair goes through the model once, in its first document. Queries of the second attend to keys and values
that are gathered: those of the prompt, then its own, which is the layout of two whole documents. A key's gradient is
that of its own document plus that of its copy: two numbers, in one order, so that no sum depends on the GPU's timing.

Shapes: T tokens, S keys, N columns, K key heads, C dimensions of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from veneer.engine.fused import flash4
from veneer.machine.device import to_device


class Keys(NamedTuple):
    """The keys of documents of which some begin with tokens of another one, which are not among their own.

    Attributes:
        lengths: keys of each document: its tokens and those before them.
        bounds: offsets in the keys at which documents begin and the last one ends, int32, on the device.
        source_S: token whose key each is, int64.
        own_T: each token's place among the keys, int64.
        copy_T: place of its copy for another document, int64; 0 where it has none.
        has_no_copy_T: whether it has none.
    """

    lengths: tuple[int, ...]
    bounds: torch.Tensor
    source_S: torch.Tensor
    own_T: torch.Tensor
    copy_T: torch.Tensor
    has_no_copy_T: torch.Tensor

    @staticmethod
    def of(lengths: Sequence[int], shared: Sequence[int], documents_per_row: int, count: int) -> "Keys":
        """Lay out the keys of documents, on the host.

        Args:
            lengths: tokens of each, with those that are shared.
            shared: those of `Batch`.
            documents_per_row: those of a row, whose first one computes what is shared.
            count: number of keys, padded; those after the last document belong to none.
        """
        source_S = torch.zeros(count, dtype=torch.int64)
        own_T, copy_T = torch.zeros((2, sum(lengths) - sum(shared)), dtype=torch.int64)
        has_no_copy_T = torch.ones(len(own_T), dtype=torch.bool)
        token = key = first = 0
        for number, (length, before) in enumerate(zip(lengths, shared, strict=True)):
            if number % documents_per_row == 0:
                first = token
            own = slice(token, token + length - before)
            source_S[key : key + before] = torch.arange(first, first + before)
            source_S[key + before : key + length] = torch.arange(own.start, own.stop)
            own_T[own] = torch.arange(key + before, key + length)
            assert has_no_copy_T[first : first + before].all(), "a token has one copy at most"
            copy_T[first : first + before] = torch.arange(key, key + before)
            has_no_copy_T[first : first + before] = False
            token, key = own.stop, key + length
        return Keys(tuple(lengths), offsets(lengths), source_S, own_T, copy_T, has_no_copy_T)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.bounds, self.source_S, self.own_T, self.copy_T, self.has_no_copy_T

    def gather(self, kv_TN: torch.Tensor) -> torch.Tensor:
        """Return the keys' rows of a tensor with a row for each token; (S, N)."""
        return kv_TN.index_select(0, self.source_S)

    def add_copies(self, gradient_SKC: torch.Tensor) -> torch.Tensor:
        """Return each token's gradient: that of its own key plus that of its copy, in this order; (T, K, C)."""
        copies = gradient_SKC.index_select(0, self.copy_T).masked_fill_(self.has_no_copy_T[:, None, None], 0.0)
        return copies.add_(gradient_SKC.index_select(0, self.own_T))


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    """Return the offsets at which documents begin and the last one ends; int32, on the host."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


class Documents(NamedTuple):
    """The documents of a packed batch.

    Attributes:
        lengths: tokens of each document.
        position_T: each token's row in the rotary tables, int32.
        bounds: offsets at which documents begin and the last one ends, int32, on the device.
        longest: tokens, or keys, of the longest document, or more.
        keys: keys of the documents, where these share tokens; None: each has its own.
    """

    lengths: tuple[int, ...]
    position_T: torch.Tensor
    bounds: torch.Tensor
    longest: int
    keys: Keys | None = None

    @staticmethod
    def of(lengths: Sequence[int], device: Any, switch: int | None = None, shared: Sequence[int] = ()) -> "Documents":
        """Lay out documents of these lengths; `with_keys` adds the keys of others.

        Args:
            lengths: tokens of each.
            device: device of the tensors.
            switch: length beyond which documents have a rotary table of their own, that many rows further down.
            shared: first tokens of each that are left out.
        """
        shared = shared or [0] * len(lengths)
        starts = [switch if switch is not None and length > switch else 0 for length in lengths]
        positions = torch.cat(
            [
                torch.arange(start + before, start + length, dtype=torch.int32)
                for start, length, before in zip(starts, lengths, shared, strict=True)
            ]
        )
        own = tuple(length - before for length, before in zip(lengths, shared, strict=True))
        return Documents(own, to_device(positions, device), to_device(offsets(own), device), max(lengths))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, on the device."""
        return (self.position_T, self.bounds, *(self.keys.tensors if self.keys is not None else ()))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Documents":
        """Return the same with other tensors, in the order of `tensors`."""
        keys = None if self.keys is None else Keys(self.keys.lengths, *tensors[2:])
        return self._replace(position_T=tensors[0], bounds=tensors[1], keys=keys)

    def with_keys(self, keys: Keys, device: Any) -> "Documents":
        """Return the same with keys, which are moved to the device."""
        return self._replace(keys=Keys(keys.lengths, *(to_device(tensor, device) for tensor in keys.tensors)))

    def padded(self, count: int, longest: int) -> "Documents":
        """Return the same with empty documents after the last, so many in all, and another upper limit of lengths."""

        def extended(bounds: torch.Tensor) -> torch.Tensor:
            return torch.cat([bounds, bounds[-1:].expand(count + 1 - len(bounds))])

        keys = None if self.keys is None else self.keys._replace(bounds=extended(self.keys.bounds))
        return self._replace(bounds=extended(self.bounds), longest=longest, keys=keys)

    @property
    def key_bounds(self) -> torch.Tensor:
        """The bounds of the keys."""
        return self.bounds if self.keys is None else self.keys.bounds

    @property
    def span(self) -> flash4.Bounds:
        """The bounds, as FlashAttention-4 takes them."""
        return flash4.Bounds(self.bounds, self.key_bounds, self.longest)

    @property
    def is_even(self) -> bool:
        """Whether all are of one length, and have their own keys alone."""
        return self.keys is None and len(set(self.lengths)) == 1
