"""What a plan is made for: a base model by its configuration, as the reference engine would train it."""

from functools import lru_cache
from typing import Any

import torch

from veneer.config import Model, Run
from veneer.engine.rehearsal import rehearse
from veneer.engine.survey import Lengths, rows_from
from veneer.model.shapes import build, find_config, is_at_hand, shapes_of
from veneer.plan.forecast import Rows, Subject, assumed_rows
from veneer.plan.machine import named_dtype
from veneer.plan.memory import Rehearsed, Step


class _Known:
    """A configuration that equals another with the same content."""

    def __init__(self, config: Any, content: tuple[str, str, int, int | None]) -> None:
        self.config = config
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@lru_cache(maxsize=256)
def _rehearsed(known: _Known, step: Step) -> Rehearsed:
    """A rehearsal; planning the same again, with another optimizer say, costs nothing."""
    _, attention, depth, period = known.content
    return rehearse(lambda layers: build(known.config, step.dtype, layers, attention), depth, period, step)


def subject_of(model: Model, data: tuple[Lengths, Lengths] | str) -> Subject:
    """What to plan for.

    Args:
        model: The base; its weights are not touched.
        data: Lengths of the training and of the held-out rows, or why there are none.

    Raises:
        UserError: There is no such base, or it cannot be planned for.
    """
    config = find_config(model)
    shapes = shapes_of(build(config, torch.bfloat16, attention=model.attn_implementation))

    # What decides the rehearsal, in a form that can be compared.
    known = config.to_json_string(use_diff=False), model.attn_implementation, shapes.depth, shapes.period

    def rehearse_step(step: Step) -> Rehearsed:
        return _rehearsed(_Known(config, known), step)

    def assume(run: Run) -> Rows:
        return assumed_rows(run, str(data))

    stored = getattr(config, "dtype", None)
    return Subject(
        name=model.base,
        shapes=shapes,
        rehearse=rehearse_step,
        rows=rows_from(*data) if isinstance(data, tuple) else assume,
        stored=stored if isinstance(stored, torch.dtype) else named_dtype(str(stored), torch.bfloat16),
        download_bytes=0 if is_at_hand(model) else shapes.total * 2,
    )
