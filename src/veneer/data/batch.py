"""Which examples stand in which step, and the batch that an engine reads.

A batch is packed: the documents of a micro-batch lie one behind the other in one row of tokens, with their lengths
beside them. An engine that can attend within documents reads it as it is; another one pads the documents itself.
Either way a document never sees another, and padding never enters the data, so that no real end token can be
taken for padding.

The order is a pure function of the seed, the epoch and the step: a resumed run finds its place without replaying.
All rows of an optimizer step are drawn first and then cut into micro-batches by length, so that 1 x 8, 2 x 4 and
8 x 1 hold the same rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

UNTRAINED = -100  # target of a position that is not trained, as in torch's cross_entropy


@dataclass(frozen=True)
class Example:
    """One document. targets[i] is the token to predict at position i, or UNTRAINED."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    place: str

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(target != UNTRAINED for target in self.targets)


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch. T tokens in all; int64.

    Attributes:
        ids_T: Tokens of the documents, one behind the other.
        targets_T: Next token where it is trained, else UNTRAINED. Never crosses a document.
        lengths: Tokens of each document; they add up to T.
        trained: Number of trained tokens.
    """

    ids_T: torch.Tensor
    targets_T: torch.Tensor
    lengths: tuple[int, ...]
    trained: int

    @staticmethod
    def of(examples: Sequence[Example]) -> "Batch":
        """Lay examples one behind the other."""
        ids_T = torch.tensor([token for example in examples for token in example.ids])
        targets_T = torch.tensor([target for example in examples for target in example.targets])
        lengths = tuple(len(example.ids) for example in examples)
        return Batch(ids_T, targets_T, lengths, int((targets_T != UNTRAINED).sum()))

    @property
    def tokens(self) -> int:
        return len(self.ids_T)

    def to(self, device: str) -> "Batch":
        return Batch(self.ids_T.to(device), self.targets_T.to(device), self.lengths, self.trained)


class Batches:
    """All steps of a run over its examples.

    Args:
        examples: The training examples.
        batch_size: Rows (or packs) of a micro-batch.
        accumulation: Micro-batches of an optimizer step.
        seed: Of the order.
        pack_length: Fill packs of so many tokens; None: a row is one example.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        accumulation: int,
        seed: int,
        pack_length: int | None = None,
    ) -> None:
        self._rows = [[example] for example in examples] if pack_length is None else pack(examples, pack_length)
        self._batch_size = batch_size
        self._rows_per_step = batch_size * accumulation
        self._seed = seed
        self.steps_per_epoch = math.ceil(len(self._rows) / self._rows_per_step)

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the run."""
        return max_steps if max_steps is not None else max(1, math.ceil(epochs * self.steps_per_epoch))

    def step(self, number: int) -> list[Batch]:
        """Micro-batches of optimizer step `number`, counted from 0, longest rows first."""
        epoch, place = divmod(number, self.steps_per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
        chosen = order[place * self._rows_per_step : (place + 1) * self._rows_per_step]
        rows = sorted((self._rows[n] for n in chosen), key=lambda row: -sum(len(example.ids) for example in row))
        micro_batches = [rows[n : n + self._batch_size] for n in range(0, len(rows), self._batch_size)]
        return [Batch.of([example for row in micro for example in row]) for micro in micro_batches]


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Best-fit decreasing: the longest example first, each into the fullest pack that still has room for it."""
    packs: list[list[Example]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        need = len(example.ids)
        room = next((room for room in range(need, length + 1) if by_room[room]), None)
        if room is None:
            packs.append([])
            number, room = len(packs) - 1, length
        else:
            number = by_room[room].pop()
        packs[number].append(example)
        by_room[room - need].append(number)
    return packs
