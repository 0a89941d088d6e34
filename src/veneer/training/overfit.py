"""Trains on a few rows until they are learnt by heart, as a check that a run would learn at all."""

import math
from collections.abc import Iterator, Sequence

import torch

from veneer.config import Run, Train
from veneer.config.results import Check
from veneer.data.batch import Batch, Example
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective
from veneer.model.adapters import find_method
from veneer.training.optimizer import optimizer_of, parameters_to_update
from veneer.training.parts import RunParts
from veneer.training.verify_preference import NO_REFERENCE, compares, completed

STEPS = 40  # in which it must succeed
OVERFIT = 0.95  # of the loss at the beginning: modest, since an adapter on q_proj of a random model comes no lower
ACCURACY, PREFERRED = "rewards/accuracies", 0.75  # the metric of pairs, and its least value then
# By how much all ranks of an adapter together may move in the first and in the last of the steps. Large models learn at
# once where small ones have hardly begun, and what suits these would throw those off: so the rate rises until one does.
FIRST_STRIDE, LAST_STRIDE = 0.01, 0.2
FULL_SHARE = 2e-3  # of it for whole weights: 2e-5 to 4e-4


def overfit(
    run: Run, parts: RunParts, engine: Engine, objective: Objective, rows: Sequence[Example]
) -> Iterator[Check]:
    """Train on rows until they are learnt by heart, with the run's own optimizer and dropout.

    Args:
        run: settings.
        parts: the run's parts; their adapter is changed.
        engine: engine of the model.
        objective: loss that is learnt.
        rows: examples.
    """
    each = objective.documents_per_row
    size = run.train.per_device_train_batch_size * each
    batches = [Batch.of(rows[n : n + size], each) for n in range(0, len(rows), size)]
    weight = sum(map(objective.weight, batches))
    batches = [batch.scaled(1 / weight) for batch in completed(run, parts, engine, objective, batches)]
    train, device = run.train, parts.machine.device
    updated = parameters_to_update(parts.model, engine, train, device)
    plain = Train(optim=train.optim, optim_rank=train.optim_rank, master_weights="none")
    optimizer = optimizer_of(parts.model, updated, plain, device)
    first = share = math.nan
    accuracy: float | None = None
    is_judged = compares(run, objective) or run.model.task == "reward"
    for step in range(STEPS + 1):
        each_batch = objective.begin_step(engine, batches)
        outputs = [engine.forward_backward(batch, objective) for batch in each_batch]
        loss = torch.stack([output.loss for output in outputs]).sum().item() / weight
        if ACCURACY in outputs[0].metrics and is_judged:
            accuracy = torch.stack([output.metrics[ACCURACY] for output in outputs]).sum().item() / weight
        first = loss if step == 0 else first
        share = loss / first
        if not (share > OVERFIT or (accuracy is not None and accuracy < PREFERRED)):  # also where it is no number
            break
        torch.nn.utils.clip_grad_norm_(updated.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _rate(run, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    count = len(rows) // each
    name = f"loss of {count} rows after up to {STEPS} steps on them, of the loss before"
    yield Check.at_most("overfit", share, OVERFIT, name)
    if accuracy is not None:
        name = f"share of {count} pairs whose chosen answer is preferred then"
        yield Check("preferred", accuracy >= PREFERRED, accuracy, PREFERRED, name, bound="at least")
    elif each > 1:
        why = f"{NO_REFERENCE}: lengths decide which answer is likelier"
        yield Check("preferred", True, name="share of pairs whose chosen answer is preferred then", detail=why)


def _rate(run: Run, step: int) -> float:
    """Return the rate of a step: Adam moves each value of B by it, and ranks add up, so scale and rank divide it."""
    stride: float = FIRST_STRIDE * (LAST_STRIDE / FIRST_STRIDE) ** (step / STEPS)
    if run.adapter is None:
        return FULL_SHARE * stride
    method = find_method(run.adapter)
    return stride / (method.scale(run.adapter) * (run.adapter.r if method.has("r") else 1))
