"""The reference's log-probabilities of answers, which `train.reference` says when to compute.

The reference is the model that training starts from: the base with the adapter of `model.adapter`, or the base alone.
Each document's summed log-probability stands with its first trained token.

cached: once, before the first step, and kept on disk (reference_cache.py). The engine computes the very micro-batches
    of the first epoch, so that the first step's log-ratios are 0 to the last bit where the engine computes its passes
    with and without gradients alike.
live: at each step, of the step's micro-batches, with a frozen copy of the starting adapter in the adapter's place. It
    takes the memory of a second adapter and a forward pass a step; there is no second model.
none: the sums are 0, so that the log-ratios of an objective are plain log-probabilities.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from veneer.config import Run, Train
from veneer.data.batch import Batch, Batches
from veneer.data.pipeline import Part, Prepared
from veneer.engine.interface import Engine, document_losses
from veneer.engine.objective import Objective, TrainedTokens
from veneer.machine.batching import Batching
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.adapters.from_error import starts_from_error
from veneer.training.held_out import HeldOutRows

NAME = "reference"
WHAT, LESS = "the reference's log-probabilities", "lower data.max_length"
WithReference = Callable[[Batch], Batch]


def describe_reference(run: Run, data: Prepared) -> str:
    """Return what is told of a run's objective and its reference."""
    start, why = run.model.adapter, ""
    if start is None and run.adapter is not None and starts_from_error(run.adapter):
        start = "the base with the adapter's first values"
    elif start is None:
        start, why = "the base", " (model.adapter names no adapter)" if run.adapter is not None else ""
    learns = {
        "pairs": "the rows are pairs, so the run learns to prefer the chosen answers (train.objective: dpo); ",
        "rated": "the rows are rated, so the run learns to prefer good answers to bad ones (train.objective: kto); ",
    }[data.kind]
    if run.train.reference == "none":
        return f"{learns}it starts from {start}, and compares with no reference (train.reference: none)"
    when = "computed at each step" if run.train.reference == "live" else "computed first"
    return f"{learns}it starts from {start}{why}, which is the reference, and whose log-probabilities are {when}"


def completes_batches(train: Train, objective: Objective, model: Any, engine: Engine) -> WithReference:
    """Return a function that gives each batch its reference where that is live, and leaves it as it is elsewhere."""
    is_live = objective.needs_reference and train.reference == "live"
    return LiveReference(model, engine) if is_live else lambda batch: batch


class LiveReference:
    """Gives batches the log-probabilities of the adapter as it was when this was made.

    Args:
        model: PEFT model, whose adapter is what training starts from.
        engine: engine of the model.
    """

    def __init__(self, model: Any, engine: Engine) -> None:
        self._engine = engine
        adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adapter = adapter if engine.master is None else [engine.master]
        self._frozen = [parameter.detach().clone() for parameter in self._adapter]

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with its reference; the adapter is afterwards what it was."""
        self._exchange()
        try:
            return with_sums(batch, document_sums(self._engine, batch))
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Exchange adapter and copy, in place: three exclusive ors take no memory, so that none can run out midway."""
        for parameter, copy in zip(self._adapter, self._frozen, strict=True):
            bits = torch.int32 if parameter.element_size() == 4 else torch.int16  # trained biases and modules
            one, other = parameter.data.view(bits), copy.view(bits)
            one ^= other
            other ^= one
            one ^= other


def document_sums(engine: Engine, batch: Batch) -> list[float]:
    """Return the weighted log-probability of each document with the model as it is now."""
    return [-loss for loss in document_losses(engine, batch)]


def with_sums(batch: Batch, sums: Sequence[float]) -> Batch:
    """Return a batch with the reference's sum of each document, at its first trained token, in float32."""
    tokens = TrainedTokens.of(batch, torch.zeros(int((batch.targets_T >= 0).sum())))
    document_N = tokens.to_tokens(torch.arange(len(sums)))
    is_first_N = torch.diff(document_N, prepend=document_N.new_tensor([-1])) != 0
    value_T = torch.zeros(len(batch.ids_T))
    value_T[tokens.index_N[is_first_N]] = torch.tensor(sums, dtype=torch.float32)[document_N[is_first_N]]
    return replace(batch, values={**batch.values, NAME: value_T})


def give_none(data: Prepared) -> None:
    """Give all examples of a run a reference of 0."""
    for part in (data.train, data.validation):
        part.values[NAME] = np.zeros(len(part), dtype=np.float32)


def measure_reference(
    engine: Engine,
    data: Prepared,
    batches: Batches,
    steps: int,
    held_out: HeldOutRows,
    batching: Batching,
    ranks: Ranks = ALONE,
) -> None:
    """Give all examples that a run reads their reference, with the model as it is now.

    Args:
        engine: Engine of the run.
        data: Data of the run, whose examples are given it.
        batches: Steps over the training rows.
        steps: Number of steps of the run.
        held_out: Held-out rows, in the order in which their loss is measured.
        batching: Batches in which it is measured.
        ranks: This process among those of the run, each of which takes a share of the rows.
    """
    _measure_training_rows(engine, data.train, batches, steps, ranks)
    _measure_held_out_rows(engine, data.validation, held_out, batching, ranks)


def _measure_training_rows(engine: Engine, part: Part, batches: Batches, steps: int, ranks: Ranks) -> None:
    sums = np.full(len(part), np.nan, dtype=np.float32)  # of what no step reads
    part.values.pop(NAME, None)
    micro_batches = [
        members for step in range(min(steps, batches.steps_per_epoch)) for members in batches.members_of_step(step)
    ]

    def measure(members: Sequence[int]) -> list[float]:
        # Nobody has tried how much memory a micro-batch takes yet.
        batching = Batching(len(members), LESS, WHAT, together=len(part) // len(part.rows))
        found = batching.over(members, lambda some: document_sums(engine, batches.batch_of(some)))
        return list(chain.from_iterable(found))

    found = ranks.spread(micro_batches, lambda some: [measure(members) for members in some])
    for members, values in zip(micro_batches, found, strict=True):
        sums[members] = values
    part.values[NAME] = sums


def _measure_held_out_rows(engine: Engine, part: Part, held_out: HeldOutRows, batching: Batching, ranks: Ranks) -> None:
    part.values.pop(NAME, None)
    sums = np.empty(len(part), dtype=np.float32)

    size = held_out.documents_per_row
    rows = held_out.order.reshape(-1, size)

    def measure(members: Sequence[int]) -> list[float]:
        return document_sums(engine, Batch.of([part[n] for n in members], size))

    def measure_rows(some: Sequence[Any]) -> list[list[float]]:
        members = np.concatenate(some).tolist() if some else []
        found = list(chain.from_iterable(batching.over(members, measure)))
        return [found[start : start + size] for start in range(0, len(found), size)]

    for members, values in zip(rows, ranks.spread([*rows], measure_rows), strict=True):
        sums[members] = values
    part.values[NAME] = sums
