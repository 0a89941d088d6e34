"""Batch shapes of a run's data: the largest possible micro-batch, and a typical one.

Rows of a step have similar lengths (`veneer.data.Batches`), so the largest micro-batch consists of neighbours in the
order of length. The rows that go through the model together are those that the engine itself would batch: the reference
engine pads groups of similar length, the fused one takes all at once, and the prompt of a pair once.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from veneer.config import OF_PAIRS, Run
from veneer.data.batch import pack
from veneer.engine.fused.graphs import MAX_GRAPHS, PassShape
from veneer.engine.reference import padded_groups

MAX_SAMPLED = 2000  # micro-batches to inspect
LONGEST = 200  # those of the longest rows among them


class Padded(NamedTuple):
    """Rows that go through the model together: their number, padded length, and trained tokens."""

    rows: int
    length: int
    trained: int


@dataclass(frozen=True)
class RowShapes:
    """Batch shapes of a run's data in its engine.

    Attributes:
        fullest: micro-batch with the most tokens.
        typical: typical micro-batch, which decides the time.
        passes: passes of an optimizer step.
        tokens: real tokens of an optimizer step.
        steps: optimizer steps; None: not known.
        held_out: largest batch of the held-out loss; None: there is none.
        held_out_passes: passes of the held-out loss.
        answered: rows that `veneer evaluate` answers: their number, and the most tokens and trained tokens of one;
            None: there are none.
        unread: reason why the data was not read; None: it was.
        even: whether all rows are of one length.
        replayed: share of micro-batches of the most frequent shapes, which are recorded and replayed.
        count: rows of an epoch, or packed sequences; None: not known.
    """

    fullest: Padded
    typical: Padded
    passes: float
    tokens: float
    steps: int | None
    held_out: Padded | None
    held_out_passes: float
    answered: Padded | None
    unread: str | None
    even: bool = True
    replayed: float = 1.0
    count: int | None = None


def assumed_rows(run: Run, positions: int | None, why: str) -> RowShapes:
    """Return the largest shapes that a run's settings and its base's positions allow, where data cannot be read."""
    train, length = run.train, run.data.max_length
    if positions is not None and not run.data.packing:
        length = min(length, positions)
    documents = train.per_device_train_batch_size * (2 if train.objective in OF_PAIRS else 1)
    full = Padded(documents, length, documents * (length - 1))
    passes = train.gradient_accumulation_steps
    held_out = Padded(run.evaluate.batch_size, length, run.evaluate.batch_size * (length - 1))
    return RowShapes(
        full,
        full,
        passes,
        passes * full.rows * length,
        train.max_steps,
        held_out if run.data.validation else None,
        0,
        Padded(run.evaluate.rows or run.evaluate.batch_size, length, length - 1) if run.data.validation else None,
        why,
        even=not run.data.packing,
    )


class Lengths(NamedTuple):
    """Lengths of every document; integer arrays.

    Attributes:
        tokens, trained: its tokens, and those of them that are trained.
        shared: those that an engine may leave out, of pairs (`veneer.data.batch.shared_in_rows`); None: none.
    """

    tokens: Any
    trained: Any
    shared: Any = None

    def within(self, run: Run, documents_per_row: int = 1) -> "Lengths":
        """Return the lengths of documents under a run's max_length; rows of several are left out whole."""
        longest = run.data.max_length
        if documents_per_row == 1 and run.data.overlong == "truncate":
            return Lengths(np.minimum(self.tokens, longest), np.minimum(self.trained, longest - 1))
        fits = (self.tokens <= longest).reshape(-1, documents_per_row).all(1)
        kept = np.repeat(fits, documents_per_row)
        return Lengths(*(part if part is None else part[kept] for part in self))

    def without_shared(self) -> "Lengths":
        """Return the lengths for an engine that leaves nothing out."""
        return self._replace(shared=None)


def rows_of(run: Run, engine: str, train: Lengths, held_out: Lengths, documents_per_row: int = 1) -> RowShapes:
    """Compute shapes of a run's micro-batches in an engine (reference or fused), from the lengths of its documents.

    `Lengths.shared` is given where the engine leaves these tokens out.
    """
    sizes: Counter[PassShape] = Counter()
    met: set[int] = set()

    def grouped(lengths: list[int], trained: list[int], shared: list[int]) -> list[Padded]:
        sizes[PassShape.of(lengths, sum(trained), shared)] += 1
        met.update(lengths if not any(shared) else [*lengths, 0])
        if run.releases_gradients and len(lengths):  # all rows are padded alike
            return [Padded(len(lengths), max(lengths), sum(trained))]
        return _whole(lengths, trained, shared) if engine == "fused" else _padded(lengths, trained)

    settings = run.train
    train, held_out = train.within(run, documents_per_row), held_out.within(run, documents_per_row)
    if not len(train.tokens):
        length = np.full(documents_per_row, run.data.max_length)
        train = Lengths(length, length - 1)
    size, rows = settings.per_device_train_batch_size, np.arange(len(train.tokens)) // documents_per_row
    packs = pack(train.tokens, run.data.max_length) if run.data.packing else rows
    batches = list(_micro_batches(train, packs, size, grouped))
    replayed = sum(count for _, count in sizes.most_common(MAX_GRAPHS)) / sizes.total()
    count = int(packs.max()) + 1
    in_step = min(size * settings.gradient_accumulation_steps, count)
    steps_an_epoch = -(-count // (size * settings.gradient_accumulation_steps))
    steps = settings.max_steps or max(1, int(np.ceil(settings.num_train_epochs * steps_an_epoch)))
    answered = Lengths(*(part[: run.evaluate.rows] for part in held_out[:2]))
    held_out_rows = np.arange(len(held_out.tokens)) // documents_per_row
    at_a_time = max(1, run.evaluate.batch_size // documents_per_row)
    tested = list(_micro_batches(held_out, held_out_rows, at_a_time, grouped))
    shared = 0 if train.shared is None else train.shared.sum()
    return RowShapes(
        fullest=_fullest(batches),
        typical=_typical(batches),
        passes=in_step / size * sum(map(len, batches)) / len(batches),
        tokens=float(train.tokens.sum() - shared) / count * in_step,
        steps=steps,
        held_out=_fullest(tested) if tested else None,
        held_out_passes=len(held_out.tokens) / run.evaluate.batch_size,
        answered=Padded(len(answered.tokens), *(int(part.max()) for part in answered[:2])) if tested else None,
        unread=None,
        even=len(met) == 1,
        replayed=replayed,
        count=count,
    )


def _padded(lengths: list[int], trained: list[int]) -> list[Padded]:
    """Return the groups of similar length that the reference engine pads."""
    groups = padded_groups(lengths)
    return [Padded(len(group), lengths[group[0]], sum(trained[n] for n in group)) for group in groups]


def _whole(lengths: list[int], trained: list[int], shared: list[int]) -> list[Padded]:
    """Return rows of one length with the same tokens and attention as one batch of the fused engine.

    Tokens that a document shares are keys of its others, and no queries.
    """
    total = sum(lengths) - sum(shared)
    rows = max(1, round(total * total / (sum(n * n for n in lengths) - sum(n * n for n in shared))))
    return [Padded(rows, -(-total // rows), sum(trained))]


def _micro_batches(
    rows: Lengths, packs: Any, size: int, grouped: Callable[[list[int], list[int], list[int]], list[Padded]]
) -> Iterator[list[Padded]]:
    """Yield micro-batches of neighbours in the order of length, each as the groups that the engine makes of it.

    The length of a row is that of its longest document; of a pair that shares tokens, all that is computed.
    """
    shared = np.zeros_like(rows.tokens) if rows.shared is None else rows.shared
    order = np.lexsort((-rows.tokens, packs))
    starts = np.flatnonzero(np.r_[True, np.diff(packs[order]) != 0])
    members = np.split(order, starts[1:]) if len(order) else []
    longest = np.array([rows.tokens[rows_in[0]] for rows_in in members])
    if rows.shared is not None:
        computed = rows.tokens - shared
        longest = np.array([computed[rows_in].sum() for rows_in in members])
    members = [members[n] for n in np.argsort(-longest, kind="stable")]
    last = max(1, len(members) - size + 1)
    for start in _spread(last) if members else ():
        chosen = np.concatenate(members[start : start + size])
        yield grouped(*([int(n) for n in part[chosen]] for part in (rows.tokens, rows.trained, shared)))


def _spread(count: int) -> list[int]:
    """Return indices of micro-batches to inspect: evenly spread, and all of the first."""
    even = np.linspace(0, count - 1, min(count, MAX_SAMPLED)).astype(int)
    return sorted({*even.tolist(), *range(min(LONGEST, count))})


def _fullest(batches: list[list[Padded]]) -> Padded:
    return max((group for groups in batches for group in groups), key=lambda group: (group.rows * group.length, group))


def _typical(batches: list[list[Padded]]) -> Padded:
    groups = np.array([group for groups in batches for group in groups], dtype=float)
    rows = max(1.0, float(groups[:, 0].mean()))
    tokens = float((groups[:, 0] * groups[:, 1]).mean())
    whole = round(rows)
    length = max(2, round(tokens / whole))
    return Padded(whole, length, min(max(1, round(float(groups[:, 2].mean()))), whole * (length - 1)))
