"""Finds what alarms know of a job."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from veneer.config import Run
from veneer.data.batch import Batches, Example
from veneer.data.pipeline import Prepared
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective
from veneer.machine.device import bytes_now
from veneer.model.load import compute_dtype
from veneer.training.alarms.alarm import JobFacts
from veneer.training.first_gradients import learn_first
from veneer.training.schedule import learning_rate

LEAST_VALUES = 64  # of a watched parameter


def facts_of(
    run: Run,
    data: Prepared,
    engine: Engine,
    objective: Objective,
    model: Any,
    batches: Batches,
    held_out: Sequence[Example],
    machine: Any,
    planned_speed: float | None,
    steps: Callable[[], int],
) -> JobFacts:
    """Return what alarms know of a job.

    Args:
        run, data, engine, objective, model, batches, held_out: The job's parts.
        machine: The machine.
        planned_speed: Planned tokens a second.
        steps: Function that returns the steps of the run, which are known once its loop is.
    """
    train, notes = run.train, data.ledger.notes
    is_text = any(known["format"] == "text" for known in data.ledger.formats.values())
    is_causal_lm = run.model.task == "causal-lm"
    return JobFacts(
        engine=engine,
        device=machine.device,
        is_causal_lm=is_causal_lm,
        masks_prompts=is_causal_lm and run.data.loss_on != "all" and not is_text,
        is_supervised=is_causal_lm and objective.is_weighted_sum,
        has_dropout=_has_dropout(run, model),
        is_16_bit=compute_dtype(run.model, machine) != torch.float32,
        documents_per_row=objective.documents_per_row,
        steps_per_epoch=batches.steps_per_epoch,
        known_duplicates=notes["duplicate_kept"],
        known_held_out=notes["in_held_out_file"],
        held_out=held_out,
        rate=lambda step: learning_rate(
            step, steps(), _number(train.learning_rate), train.warmup_ratio, train.lr_scheduler_type
        ),
        rate_ratio=train.loraplus_lr_ratio or 1.0,
        watched=None if run.adapter is None else _watched(model),
        planned_speed=planned_speed,
        memory=partial(bytes_now, machine.device),
    )


def _number(rate: float | str) -> float:
    assert not isinstance(rate, str), "it is found before the loop is made"
    return rate


def _has_dropout(run: Run, model: Any) -> bool:
    dropped = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    attention = getattr(model.config, "attention_dropout", 0.0) or 0.0
    return max(dropped, default=0.0) > 0 or attention > 0 or (run.adapter is not None and run.adapter.lora_dropout > 0)


def _watched(model: Any) -> torch.nn.Parameter | None:
    """Return a matrix of the adapter whose updates show the rate."""
    return next(
        (
            parameter
            for name, parameter in learn_first(model).items()
            if parameter.dtype == torch.float32 and parameter.numel() >= LEAST_VALUES and ".lora_B." in name
        ),
        None,
    )
