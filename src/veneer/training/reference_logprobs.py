"""Computes the reference's log-probabilities of answers once, with the model that training starts from.

That model is the reference: the base with the adapter of `model.adapter`, or the base alone. Each document's summed
log-probability is kept with its examples. The engine computes the very micro-batches of the first epoch, so that the
first step's log-ratios are 0 to the last bit where the engine computes its passes with and without gradients alike.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from veneer.config import Run
from veneer.data.batch import Batch, Batches
from veneer.data.pipeline import Part, Prepared
from veneer.engine.interface import Engine, document_losses
from veneer.machine.batching import Batching
from veneer.training.held_out import HeldOutRows

NAME = "reference"
WHAT, LESS = "the reference's log-probabilities", "lower data.max_length"


def describe_reference(run: Run, data: Prepared) -> str:
    """Return what is told of a run's objective and its reference."""
    start, why = run.model.adapter, ""
    if start is None:
        start, why = "the base", " (model.adapter names no adapter)"
    learns = {
        "pairs": "the rows are pairs, so the run learns to prefer the chosen answers (train.objective: dpo)",
        "rated": "the rows are rated, so the run learns to prefer good answers to bad ones (train.objective: kto)",
    }
    return (
        f"{learns[data.kind]}; it starts from {start}{why}, which is the reference, and whose log-probabilities are "
        "computed first"
    )


def measure_reference(
    engine: Engine, data: Prepared, batches: Batches, steps: int, held_out: HeldOutRows, batching: Batching
) -> None:
    """Give all examples that a run reads their `reference`, with the model as it is now.

    Args:
        engine: Engine of the run.
        data: Data of the run, whose examples are given it.
        batches: Steps over the training rows.
        steps: Number of steps of the run.
        held_out: Held-out rows, in the order in which their loss is measured.
        batching: Batches in which it is measured.
    """
    _measure_training_rows(engine, data.train, batches, steps)
    _measure_held_out_rows(engine, data.validation, held_out, batching)


def _measure_training_rows(engine: Engine, part: Part, batches: Batches, steps: int) -> None:
    sums = np.full(len(part), np.nan, dtype=np.float32)  # of what no step reads
    part.values.pop(NAME, None)
    for step in range(min(steps, batches.steps_per_epoch)):
        for members in batches.members_of_step(step):
            # Nobody has tried how much memory a micro-batch takes yet.
            batching = Batching(len(members), LESS, WHAT, together=len(part) // len(part.rows))
            losses = batching.over(members, lambda some: document_losses(engine, batches.batch_of(some)))
            sums[members] = -np.array(list(chain.from_iterable(losses)))
    part.values[NAME] = sums


def _measure_held_out_rows(engine: Engine, part: Part, held_out: HeldOutRows, batching: Batching) -> None:
    part.values.pop(NAME, None)
    sums = np.empty(len(part), dtype=np.float32)

    def measure(members: Sequence[int]) -> int:
        batch = Batch.of([part[n] for n in members], len(part) // len(part.rows))
        sums[list(members)] = -np.array(document_losses(engine, batch))
        return len(members)

    for _ in batching.over(held_out.order.tolist(), measure):
        pass
    part.values[NAME] = sums
