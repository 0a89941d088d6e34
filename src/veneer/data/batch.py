"""Deals examples out to steps, and lays out the batch that an engine reads.

A batch is packed: the documents of a micro-batch lie one behind the other in one row of tokens, with their lengths
beside them. An engine that can attend within documents reads it as it is; another one pads the documents itself.
Either way a document never sees another, and padding never enters the data, so that no real end token can be
taken for padding.

The documents of a pair begin with the same prompt. A batch holds it in both, and says how many tokens an engine may
leave out of the second (`Batch.shared`), where that can compute a prompt once. Batches are then counted and cut by the
tokens that go through the model. The order of the rows is that of whole documents, the same for every engine.

The order is a pure function of the seed and the step: a resumed run finds its place without replaying. The rows of
an epoch are shuffled, sorted by length within windows of several steps, cut into steps, and the steps shuffled: rows of
a step are of like length (so little is padded, and few shapes occur), and which step is long or short is chance. An
optimizer step is drawn whole and then cut into micro-batches, so that 1 x 8, 2 x 4 and 8 x 1 hold the same rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # where it is used it is loaded then: processes that only tokenize do without it
    import torch

UNTRAINED = -100  # target of a position that is not trained, as in torch's cross_entropy
WINDOW = 16  # steps whose rows are sorted by length together


@dataclass(frozen=True, eq=False)
class Example:
    """One document.

    Attributes:
        ids: tokens, int32.
        spans: trained tokens: (start, end, weight) of each span, rising. The first token of all is in none,
            since nothing stands before it that could predict it.
        place: place of the row it came from.
        values: further values of the document for objectives, by name.
    """

    ids: Any
    spans: tuple[tuple[int, int, float], ...]
    place: str
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """The number of trained tokens."""
        return sum(end - start for start, end, _ in self.spans)

    @property
    def weight(self) -> float:
        """Sum of its tokens' weights."""
        return sum((end - start) * weight for start, end, weight in self.spans)

    @property
    def weights(self) -> Any:
        """Weight of each token in the loss, float32; 0: not trained."""
        weights = np.zeros(len(self.ids), dtype=np.float32)
        for start, end, weight in self.spans:
            weights[start:end] = weight
        return weights

    @property
    def targets(self) -> Any:
        """The token to predict at each position, or UNTRAINED; int64."""
        targets = np.full(len(self.ids), UNTRAINED, dtype=np.int64)
        for start, end, _ in self.spans:
            targets[start - 1 : end - 1] = self.ids[start:end]
        return targets

    def weighted(self, weights: Sequence[float]) -> "Example":
        """Return it with each trained token weighted by its id."""
        trained = (at for start, end, _ in self.spans for at in range(start, end))
        return replace(self, spans=tuple((at, at + 1, weights[int(self.ids[at])]) for at in trained))

    def cut(self, length: int) -> "Example":
        """Its first tokens."""
        kept = tuple((start, min(end, length), weight) for start, end, weight in self.spans if start < length)
        return Example(self.ids[:length], kept, self.place)

    def pieces(self, length: int, lead: Any) -> list["Example"]:
        """All of it in pieces, so that every trained token is trained in one of them.

        Args:
            length: Tokens of a piece, at most.
            lead: The begin token, int32, or nothing. A piece after the first begins with it, or else with the last
                token of the piece before, since the first token of a piece cannot be trained.
        """
        pieces = [self.cut(length)]
        for start in range(length, len(self.ids), length - 1):
            end, before = start + length - 1, lead if len(lead) else self.ids[start - 1 : start]
            spans = tuple(
                (max(first, start) - start + 1, min(last, end) - start + 1, weight)
                for first, last, weight in self.spans
                if first < end and last > start
            )
            pieces.append(Example(np.concatenate([before, self.ids[start:end]]), spans, self.place))
        return pieces


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch. T tokens in all.

    Attributes:
        ids_T: Tokens of the documents, one behind the other; int64.
        targets_T: Next token where it is trained, else UNTRAINED; int64. Never crosses a document.
        weights_T: Weight of each target in the loss, float32; 0 where it is not trained.
        lengths: Tokens of each document; they add up to T.
        trained: Number of trained tokens.
        weight: Sum of their weights; the number of trained tokens where no row says otherwise.
        scale: Factor of the loss where gradients are computed; see `Engine.forward_backward`.
        values: further values of each target for objectives, by name, float32 of shape (T,). A document's value stands
            at its first trained target, with 0 at the others.
        documents_per_row: documents of a row, which stay together wherever the batch is cut.
        shared: first tokens of each document that need not go through the model, since they do so in its row's first
            document and nothing is trained there; empty: all tokens go through it.
    """

    ids_T: "torch.Tensor"
    targets_T: "torch.Tensor"
    weights_T: "torch.Tensor"
    lengths: tuple[int, ...]
    trained: int
    weight: float
    scale: float = 1.0
    values: Mapping[str, "torch.Tensor"] = field(default_factory=dict)
    documents_per_row: int = 1
    shared: tuple[int, ...] = ()

    @staticmethod
    def of(examples: Sequence[Example], documents_per_row: int = 1, shares: bool = True) -> "Batch":
        """Lay examples one behind the other.

        Args:
            examples: the documents.
            documents_per_row: documents of a row.
            shares: whether `shared` is filled, for an engine that computes a prompt once.
        """
        import torch

        ids_T = torch.from_numpy(np.concatenate([example.ids for example in examples]).astype(np.int64))
        targets_T = torch.from_numpy(np.concatenate([example.targets for example in examples]))
        weights = np.concatenate([np.append(example.weights[1:], np.float32(0)) for example in examples])
        lengths = tuple(len(example.ids) for example in examples)
        trained = int(np.count_nonzero(weights))
        starts = accumulate(lengths[:-1], initial=0)
        firsts = [start + example.spans[0][0] - 1 for start, example in zip(starts, examples) if example.spans]
        values = {name: torch.zeros(len(ids_T)) for name in examples[0].values}
        for name, value_T in values.items():
            value_T[firsts] = torch.tensor([example.values[name] for example in examples if example.spans])
        return Batch(
            ids_T,
            targets_T,
            torch.from_numpy(weights),
            lengths,
            trained,
            float(weights.sum(dtype=float)),
            values=values,
            documents_per_row=documents_per_row,
            shared=shared_in_rows(examples, documents_per_row) if shares and documents_per_row > 1 else (),
        )

    @property
    def tokens(self) -> int:
        """The tokens that go through the model."""
        return len(self.ids_T) - sum(self.shared)

    @property
    def computed(self) -> tuple[int, ...]:
        """The tokens of each document that go through the model."""
        return tuple(n - s for n, s in zip(self.lengths, self.shared, strict=True)) if self.shared else self.lengths

    @property
    def rows(self) -> int:
        """Rows, of which each is `documents_per_row` documents."""
        return len(self.lengths) // self.documents_per_row

    def with_values(self, values: Mapping[str, float]) -> "Batch":
        """Return it with further values, by name, which all tokens have alike."""
        import torch

        filled = {name: torch.full_like(self.weights_T, value) for name, value in values.items()}
        return replace(self, values={**self.values, **filled})

    def scaled(self, scale: float) -> "Batch":
        return replace(self, scale=scale)

    def halved(self) -> "tuple[Batch, Batch]":
        """Cut it between two rows, as near to half of its tokens as they allow; it must hold two at least."""
        ends = list(accumulate(self.computed))
        cuts = range(self.documents_per_row, len(ends), self.documents_per_row)
        cut = min(cuts, key=lambda documents: abs(2 * ends[documents - 1] - self.tokens))
        at = sum(self.lengths[:cut])
        first = self._part(slice(0, at), self.lengths[:cut], self.shared[:cut])
        return first, self._part(slice(at, None), self.lengths[cut:], self.shared[cut:])

    def without_shared(self) -> "Batch":
        """Return the batch of the tokens that go through the model, of `computed` documents."""
        import torch

        if not self.shared:
            return self
        kept = [torch.arange(n) >= s for n, s in zip(self.lengths, self.shared, strict=True)]
        return self._part(torch.cat(kept), self.computed, ())

    def _part(self, part: "slice | torch.Tensor", lengths: tuple[int, ...], shared: tuple[int, ...]) -> "Batch":
        weights_T = self.weights_T[part]
        return replace(
            self,
            ids_T=self.ids_T[part],
            targets_T=self.targets_T[part],
            weights_T=weights_T,
            lengths=lengths,
            trained=int(weights_T.count_nonzero()),
            weight=float(weights_T.double().sum()),
            values={name: value_T[part] for name, value_T in self.values.items()},
            shared=shared,
        )


class Batches:
    """All steps of a run over its examples.

    Args:
        examples: The training examples; may lie on disk.
        lengths: Tokens of each.
        batch_size: Rows (or packs) of a micro-batch.
        accumulation: Micro-batches of an optimizer step, of each rank.
        seed: seed of the order.
        pack_length: Fill packs of so many tokens; None: a row is so many consecutive examples as `documents_per_row`.
        documents_per_row: examples that stay together, with no packs.
        shared: `shared_in_rows` of all examples, where the engine computes them once; None: it does not.
        ranks: processes that share a step.

    Attributes:
        sizes: Tokens of each row, or pack, that go through the model.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        lengths: Any,
        batch_size: int,
        accumulation: int,
        seed: int,
        pack_length: int | None = None,
        documents_per_row: int = 1,
        shared: Any = None,
        ranks: int = 1,
    ) -> None:
        assert pack_length is None or documents_per_row == 1, "choose_objective refuses it"
        self._examples = examples
        self._lengths = lengths = np.asarray(lengths, dtype=np.int64)
        rows = np.arange(len(lengths)) // documents_per_row
        pack_of = rows if pack_length is None else pack(lengths, pack_length)
        self._documents_per_row = documents_per_row
        self._shares = shared is not None
        self._whole = np.bincount(pack_of, weights=lengths).astype(np.int64)
        computed = lengths - shared if self._shares else lengths
        self.sizes = np.bincount(pack_of, weights=computed).astype(np.int64)
        self._members = np.argsort(pack_of, kind="stable")
        self._begin = np.concatenate([[0], np.cumsum(np.bincount(pack_of))])
        self._batch_size = batch_size
        self._ranks, self._rows_per_rank = ranks, batch_size * accumulation
        self._rows_per_step = self._rows_per_rank * ranks
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.steps_per_epoch = math.ceil(len(self.sizes) / self._rows_per_step)

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the run."""
        return max_steps if max_steps is not None else max(1, math.ceil(epochs * self.steps_per_epoch))

    def step(self, number: int) -> list[Batch]:
        """Micro-batches of optimizer step `number`, counted from 0, longest rows first; those of all ranks."""
        return [self.batch_of(members) for members in self.members_of_step(number)]

    def batch_of(self, members: Sequence[int]) -> Batch:
        """A batch of some examples, by number."""
        return Batch.of([self._examples[n] for n in members], self._documents_per_row, self._shares)

    def members_of_step(self, number: int) -> list[list[int]]:
        """The examples of each micro-batch of a step, by number; those of the first rank come first."""
        return [members for micro_batches in self.members_by_rank(number) for members in micro_batches]

    def members_by_rank(self, number: int) -> list[list[list[int]]]:
        """The examples of each micro-batch of each rank in a step, by number.

        Rows are dealt by their tokens: each, the longest first, to the rank that has fewest so far. A short last step
        may leave a rank without any.
        """
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._ordered(epoch)
        chosen = self._order[place * self._rows_per_step : (place + 1) * self._rows_per_step]
        chosen = chosen[np.argsort(-self._whole[chosen], kind="stable")]
        return [self._cut(rows) for rows in deal(chosen, self.sizes[chosen], self._ranks, self._rows_per_rank)]

    def _cut(self, chosen: Sequence[int]) -> list[list[int]]:
        """Cut rows into micro-batches, as the numbers of their examples."""
        rows = [self._members[self._begin[row] : self._begin[row + 1]].tolist() for row in chosen]
        micro_batches = [rows[n : n + self._batch_size] for n in range(0, len(rows), self._batch_size)]
        return [[member for row in micro for member in row] for micro in micro_batches]

    def places_of_step(self, number: int) -> list[list[str]]:
        """The place of the row of each document of a step, by micro-batch, in their order."""
        return [[self._examples[n].place for n in members] for members in self.members_of_step(number)]

    def largest(self) -> list[Batch]:
        """The micro-batch of the longest rows, and where rows are packed that of most documents."""
        counts = [self.sizes]
        if len(self._members) > len(self.sizes) * self._documents_per_row:
            counts.append(np.diff(self._begin))
        return [self.batch_of(self._members_of(count).tolist()) for count in counts]

    def most_documents(self) -> tuple[int, ...]:
        """Tokens of each document of the rows that hold most of them, as many as a micro-batch has."""
        return tuple(self._lengths[self._members_of(np.diff(self._begin))].tolist())

    def _members_of(self, counts: Any) -> Any:
        """The examples of the rows with the highest counts, as many rows as a micro-batch has."""
        rows = np.argsort(-counts, kind="stable")[: self._batch_size]
        return np.concatenate([self._members[self._begin[row] : self._begin[row + 1]] for row in rows])

    def _ordered(self, epoch: int) -> Any:
        """The rows of an epoch in the order of its steps; the last step may hold fewer."""
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self.sizes))
        size = self._rows_per_step
        window = WINDOW * size
        for start in range(0, len(order), window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(-self._whole[part], kind="stable")]
        whole = len(order) // size
        steps = order[: whole * size].reshape(whole, size)[rng.permutation(whole)]
        return np.concatenate([steps.reshape(-1), order[whole * size :]])


def deal(rows: Any, sizes: Any, ranks: int, most: int) -> list[list[int]]:
    """Deal rows to ranks, each to the one that has fewest tokens so far and not yet `most` rows.

    Args:
        rows: rows, by number, in the order in which they are dealt.
        sizes: tokens of each.
        ranks: number of ranks.
        most: rows of a rank, at most; they hold all.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
        rank = min((n for n in range(ranks) if len(dealt[n]) < most), key=tokens.__getitem__)
        dealt[rank].append(row)
        tokens[rank] += size
    return dealt


def shared_in_rows(examples: Sequence[Example], documents_per_row: int) -> tuple[int, ...]:
    """Count the first tokens of each document that its row's first document has too; 0 for that one.

    The last token that both have is not counted: it predicts the first token of either answer. So no token that an
    engine leaves out has anything to predict.

    Args:
        examples: whole rows, so many consecutive examples each.
        documents_per_row: examples of a row.
    """
    found = []
    for number, example in enumerate(examples):
        if number % documents_per_row == 0:
            first = example
        found.append(0 if example is first else _shared_between(first, example))
    return tuple(found)


def _shared_between(first: Example, other: Example) -> int:
    most = min(len(first.ids), len(other.ids), *(one.spans[0][0] for one in (first, other) if one.spans))
    differs = np.flatnonzero(first.ids[:most] != other.ids[:most])
    return max(0, (int(differs[0]) if len(differs) else most) - 1)


def pack(lengths: Any, length: int) -> Any:
    """Best-fit decreasing: the longest row first, each into the fullest pack that still has room for it.

    Args:
        lengths: Tokens of each row, at most `length`.
        length: Tokens of a pack.

    Returns:
        The number of each row's pack, int64.
    """
    pack_of = np.empty(len(lengths), dtype=np.int64)
    packs = 0
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where a pack has room for exactly r tokens
    for row in np.argsort(-lengths, kind="stable"):
        need = int(lengths[row])
        if fitting := rooms >> need:
            room = need + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            number, room = packs, length
            packs += 1
        pack_of[row] = number
        if left := room - need:
            with_room[left].append(number)
            rooms |= 1 << left
    return pack_of
