"""Computes the reference's log-probabilities of answers once, with the model that training starts from.

That model is the reference: the base with the adapter of `model.adapter`, or the base alone. Each document's summed
log-probability is kept with its examples. The engine computes the very micro-batches of the first epoch, so that the
first step's log-ratios are 0 to the last bit where the engine computes its passes with and without gradients alike.
"""

from collections.abc import Sequence

import numpy as np

from veneer.data.batch import Batch, Batches
from veneer.data.pipeline import Part
from veneer.engine.interface import Engine, document_losses
from veneer.machine.batching import Batching
from veneer.training.held_out import HeldOutRows

NAME = "reference"


def measure_training_rows(engine: Engine, part: Part, batches: Batches, steps: int) -> None:
    """Give the training examples of a run of so many steps their `reference`; others have none."""
    sums = np.full(len(part), np.nan, dtype=np.float32)
    part.values.pop(NAME, None)
    for step in range(min(steps, batches.steps_per_epoch)):
        for members in batches.members_of_step(step):
            sums[members] = -np.array(document_losses(engine, batches.batch_of(members)))
    part.values[NAME] = sums


def measure_held_out_rows(engine: Engine, part: Part, held_out: HeldOutRows, batching: Batching) -> None:
    """Give the held-out examples their `reference`."""
    part.values.pop(NAME, None)
    sums = np.empty(len(part), dtype=np.float32)

    def measure(members: Sequence[int]) -> int:
        batch = Batch.of([part[n] for n in members])
        sums[list(members)] = -np.array(document_losses(engine, batch))
        return len(members)

    for _ in batching.over(held_out.order.tolist(), measure):
        pass
    part.values[NAME] = sums
