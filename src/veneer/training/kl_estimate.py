"""Estimates how far the model has gone from the reference, as kto needs it before the passes of a step.

The estimate is TRL's: the mean log-ratio of answers to prompts that are not theirs, and 0 where that is below 0. An
answer of the data that the model was not asked for stands for one that it would give; such rows cost a forward pass
without gradient. Two things are otherwise than in TRL:

- The mean is over all rows of an optimizer step (of held-out rows, over all of them), and not over a micro-batch. So
  the same step follows however it is cut, also where a micro-batch is one row, whose estimate in TRL is its own reward.
- The prompt of a row is always beside the same other row's answer, drawn by the seed, where TRL moves answers on by one
  within a micro-batch. So the reference's log-probabilities are computed once, and rows of one prompt, which often
  stand one behind the other, do not get each other's answer.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from veneer.data.batch import Batch, Batches, Example
from veneer.data.mismatched import MismatchedRows
from veneer.data.pipeline import Prepared
from veneer.engine.interface import Engine, document_losses
from veneer.machine.batching import Batching
from veneer.machine.ranks import ALONE, Ranks
from veneer.training.held_out import HeldOutRows
from veneer.training.objectives.kto import KL


class KLEstimate:
    """Estimates the KL divergence of the model from the reference.

    Args:
        engine: engine of the run.
        data: data of the run.
        batches: steps over the training rows.
        held_out: held-out rows.
        rows: rows that are computed together.
        max_length: tokens of a row, at most.
        seed: seed of which answer stands behind which prompt.
        ranks: this process among those of the run, each of which takes a share of the rows.
    """

    def __init__(
        self,
        engine: Engine,
        data: Prepared,
        batches: Batches,
        held_out: HeldOutRows,
        rows: int,
        max_length: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._batches = batches
        self._order = held_out.order.tolist()
        self._batching = Batching(rows, "lower data.max_length", "the log-probabilities of other rows' answers")
        parts = [MismatchedRows(part, max_length, seed) for part in (data.train, data.validation)]
        self._train, self._held_out = parts
        self._references = [np.full(len(part), np.nan) for part in parts]

    def measure_reference(self, steps: int) -> None:
        """Compute the reference's log-probabilities, with the model as it is now, for a run of so many steps."""
        of_train, of_held_out = self._references
        for step in range(min(steps, self._batches.steps_per_epoch)):
            numbers = self._numbers(step)
            of_train[numbers] = self._logprobs(self._train, numbers)
        of_held_out[self._order] = self._logprobs(self._held_out, self._order)

    def __call__(self, step: int | None) -> dict[str, float]:
        """Return the estimate, by its name, over the rows of a step; None: over the held-out rows."""
        part, numbers = (self._held_out, self._order) if step is None else (self._train, self._numbers(step))
        ratios = self._logprobs(part, numbers) - self._references[step is None][numbers]
        return {KL: max(0.0, float(ratios.mean()))}

    def _numbers(self, step: int) -> list[int]:
        return list(chain.from_iterable(self._batches.members_of_step(step)))

    def _logprobs(self, part: Sequence[Example], numbers: Sequence[int]) -> np.ndarray:
        def measure(some: Sequence[int]) -> list[float]:
            return document_losses(self._engine, Batch.of([part[n] for n in some]))

        def measure_all(some: Sequence[int]) -> list[float]:
            return list(chain.from_iterable(self._batching.over(some, measure)))

        return -np.array(self._ranks.spread(numbers, measure_all))
