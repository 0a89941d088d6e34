"""Low-rank deltas of many adapters in one batch: the base computes each linear layer once, and each row adds its own.

The matrices of all adapters are stacked a layer, in the base's compute dtype, with LoRA's scale within B; number 0 is
the base, whose matrices are zeros. A forward hook on each adapted layer adds scale * B A x to its output, so it is the
base's own layer that computes W x, in whatever bits its weights are. Three ways compute the delta, by the batch:

    one       all rows have one adapter: two products with its matrices as they lie
    masked    a token a row: two products with the matrices of all adapters at once, and between them the ranks that
              are not a row's own are set to zero. The matrices are read once, whatever the number of rows, nothing is
              copied, and the launches are the same for any mix, so that a CUDA graph can hold them
    gathered  each row's matrices are gathered for a batched product: for prompts, and for few rows of many adapters

PEFT's own mixed batches (`adapter_names`) go through the adapters one by one, with an index and an addition for each.

N adapters, B rows, T tokens of a row, I inputs, O outputs, R ranks, K = N * R.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

RANK_STEP = 8  # ranks are padded to a multiple of it


class Matrices(NamedTuple):
    """An adapter's matrices on one layer, with its scale within B."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


class _Layer:
    """Stacked matrices of one layer."""

    def __init__(self, a_NRI: torch.Tensor, b_NRO: torch.Tensor) -> None:
        self.a_NRI, self.b_NRO = a_NRI, b_NRO

    def one(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return (x @ self.a_NRI[number].T) @ self.b_NRO[number]

    def masked(self, x_BTI: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
        h_BTK = (x_BTI @ self.a_NRI.flatten(0, 1).T) * mask_BK[:, None]
        return h_BTK @ self.b_NRO.flatten(0, 1)

    def gathered(self, x_BTI: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
        h_BTR = torch.bmm(x_BTI, self.a_NRI[number_B].mT)
        return torch.bmm(h_BTR, self.b_NRO[number_B])


class AdapterBank:
    """The matrices of all adapters that are served, on the layers of one base.

    Args:
        model: The base, a Transformers model in evaluation mode; hooks are put on its layers.
        adapters: Most adapters at a time.
        dtype: Compute dtype of the base.

    Attributes:
        version: Grows when buffers are replaced, so that what was recorded with the old ones is void.
    """

    def __init__(self, model: Any, adapters: int, dtype: torch.dtype) -> None:
        self._model, self._count, self._dtype = model, adapters + 1, dtype
        self._rank = 0
        self._layers: dict[str, _Layer] = {}
        self._number: int | None = None
        self._number_B: torch.Tensor | None = None
        self._mask_BK: torch.Tensor | None = None
        self.version = 0

    @property
    def bytes(self) -> int:
        """Bytes of all matrices."""
        parts = (part for layer in self._layers.values() for part in (layer.a_NRI, layer.b_NRO))
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def numbers(self) -> range:
        """The numbers that adapters can have."""
        return range(1, self._count)

    def put(self, number: int, matrices: Mapping[str, Matrices]) -> None:
        """Give a number the matrices of an adapter, by the paths of its layers; in place of what it had."""
        assert 0 < number < self._count
        needed = max((len(one.a_RI) for one in matrices.values()), default=0)
        if needed > self._rank:
            self._widen(-(-needed // RANK_STEP) * RANK_STEP)
        self.clear(number)
        for path, one in matrices.items():
            if path not in self._layers:
                self._add_layer(path, one)
            layer, rank = self._layers[path], len(one.a_RI)
            layer.a_NRI[number, :rank] = one.a_RI.to(layer.a_NRI)
            layer.b_NRO[number, :rank] = one.b_OR.T.to(layer.b_NRO)

    def clear(self, number: int) -> None:
        """Make a number as the base is."""
        for layer in self._layers.values():
            layer.a_NRI[number] = 0
            layer.b_NRO[number] = 0

    @contextmanager
    def rows(self, numbers: list[int], tokens: int) -> Iterator[None]:
        """Within the context, the rows of a batch have these adapters; for batches that are not recorded.

        Args:
            numbers: Number of each row's adapter.
            tokens: Tokens a row.
        """
        if len(set(numbers)) == 1:
            self._number = numbers[0]
        elif tokens == 1 and self._count <= 3 * len(numbers):  # gathering writes and reads what it copies
            self._mask_BK = self.mask(torch.tensor(numbers, device=self._device))
        else:
            self._number_B = torch.tensor(numbers, device=self._device)
        try:
            yield
        finally:
            self._number = self._number_B = self._mask_BK = None

    @contextmanager
    def masked(self, mask_BK: torch.Tensor | None) -> Iterator[None]:
        """Within the context, a mask that `mask` made says which adapter a row has; for recorded passes."""
        self._mask_BK = mask_BK
        try:
            yield
        finally:
            self._mask_BK = None

    def mask(self, number_B: torch.Tensor) -> torch.Tensor:
        """Return which of all adapters' ranks belong to each row's own, [B, K], in the compute dtype."""
        owner_K = torch.arange(self._count, device=number_B.device).repeat_interleave(max(self._rank, 1))
        return (owner_K == number_B[:, None]).to(self._dtype)

    @property
    def is_empty(self) -> bool:
        """Whether no layer has matrices."""
        return not self._layers

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def _add_layer(self, path: str, like: Matrices) -> None:
        shape = (self._count, self._rank)
        device = next(self._model.get_submodule(path).parameters()).device
        a_NRI = torch.zeros((*shape, like.a_RI.shape[1]), dtype=self._dtype, device=device)
        b_NRO = torch.zeros((*shape, like.b_OR.shape[0]), dtype=self._dtype, device=device)
        self._layers[path] = layer = _Layer(a_NRI, b_NRO)
        self._model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output: self._added(layer, inputs[0], output)
        )
        self.version += 1

    def _widen(self, rank: int) -> None:
        more = rank - self._rank
        for layer in self._layers.values():
            layer.a_NRI = torch.nn.functional.pad(layer.a_NRI, (0, 0, 0, more))
            layer.b_NRO = torch.nn.functional.pad(layer.b_NRO, (0, 0, 0, more))
        self._rank = rank
        self.version += 1

    def _added(self, layer: _Layer, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self._number == 0:
            return output
        own = x.to(self._dtype)
        if self._number is not None:
            return output + layer.one(own, self._number).to(output.dtype)
        if self._mask_BK is not None:
            return output + layer.masked(own, self._mask_BK).to(output.dtype)
        if self._number_B is not None:
            return output + layer.gathered(own, self._number_B).to(output.dtype)
        return output
