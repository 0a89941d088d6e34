"""Reads a base's embeddings and head with rows for the tokens that training added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from veneer.model.new_tokens import mean_row
from veneer.model.shapes import build
from veneer.model.tuned import TunedModel
from veneer.release.weights import Stored, bytes_of


@dataclass(frozen=True)
class StoredGrown(Stored):
    """A matrix with more rows than its file has: the mean of these, as at the beginning of training.

    Attributes:
        stored: matrix in the file.
    """

    stored: Stored

    def read(self) -> torch.Tensor:
        known = self.stored.read()
        rows = mean_row(known).to(known.dtype).expand(self.shape[0] - len(known), -1)
        return torch.cat([known, rows])

    def chunks(self) -> Iterator[memoryview]:
        yield bytes_of(self.read())


def grown(tuned: TunedModel, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return embeddings and head of an adapter's base, by name, where training gave them more rows than they have."""
    if not tuned.added_tokens:
        return {}
    base = build(tuned.config, torch.float32)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {path.rpartition(".")[2] for path, module in base.named_modules() if module in ends}
    rows = len(ends[0].weight)
    found = dict[str, Stored]()
    for name, stored in tensors.items():
        if name.removesuffix(".weight").rpartition(".")[2] in names and stored.shape[0] < rows:
            shape = (rows, *stored.shape[1:])
            size = stored.dtype.itemsize * rows * stored.shape[1]
            found[name] = StoredGrown(name, stored.file, stored.dtype, shape, stored.start, size, stored)
    return found
