"""Measures the loss of each held-out row as the adapter is now, for comparisons in pairs (paired_losses.py)."""

from collections.abc import Sequence
from itertools import chain

from veneer.data.batch import Batch, Example
from veneer.engine.interface import Engine, document_losses
from veneer.engine.objective import Objective, TrainedTokens
from veneer.machine.batching import Batching
from veneer.training.held_out import HeldOutRows
from veneer.training.pair_values import outputs_of_rows
from veneer.training.paired_losses import RowLosses
from veneer.training.reference_logprobs import WithReference


class MeasuredRows:
    """Measures rows one by one.

    Args:
        engine: Engine of the run.
        objective: Its objective.
        held_out: The held-out rows.
        batching: Batches in which rows are measured.
        complete: Function that gives a batch the reference's log-probabilities.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        held_out: HeldOutRows,
        batching: Batching,
        complete: WithReference,
    ) -> None:
        self._engine, self._objective, self._held_out = engine, objective, held_out
        self._batching, self._complete = batching, complete
        self._size = objective.documents_per_row

    def of_examples(self, rows: Sequence[Example]) -> list[float]:
        """Return the summed loss of each example."""
        of_batches = self._batching.over(rows, lambda rows: document_losses(self._engine, Batch.of(rows, self._size)))
        return list(chain.from_iterable(of_batches))

    def of(self, rows: Sequence[Example]) -> RowLosses:
        """Return the loss of each of some examples; of pairs, of each pair."""
        if self._size == 1:
            return RowLosses(tuple(self.of_examples(rows)), tuple(row.weight for row in rows))
        values = self._objective.step_values(self._batching.over(rows, lambda some: Batch.of(some, self._size)))

        def measure(some: Sequence[Example]) -> list[float]:
            batch = self._complete(Batch.of(some, self._size)).with_values(values)
            tokens = TrainedTokens.of(batch, self._engine.token_logprobs(batch))
            return [output.loss.item() for output in outputs_of_rows(self._objective, tokens)]

        losses = tuple(chain.from_iterable(self._batching.over(rows, measure)))
        return RowLosses(losses, (1.0,) * len(losses))

    def of_all(self) -> RowLosses:
        """Return the loss of each held-out row; pieces of one text are one row."""
        if self._size > 1:
            return self.of(self._held_out)
        return self._held_out.by_row(self.of_examples(self._held_out))
