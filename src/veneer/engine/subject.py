"""What a plan is made for: a base model by its configuration, as the reference engine would train it."""

from veneer.config import Model, Run
from veneer.engine.rehearsal import rehearse
from veneer.engine.survey import Lengths, rows_from
from veneer.model.shapes import build, find_config, is_at_hand, shapes_of
from veneer.plan.forecast import Subject, assumed_rows
from veneer.plan.machine import named_dtype
from veneer.plan.memory import Rehearsed, Step


def subject_of(model: Model, data: tuple[Lengths, Lengths] | str) -> Subject:
    """What to plan for.

    Args:
        model: The base; its weights are not touched.
        data: Lengths of the training and of the held-out rows, or why there are none.

    Raises:
        UserError: There is no such base, or it cannot be planned for.
    """
    import torch

    config = find_config(model)
    shapes = shapes_of(build(config, torch.bfloat16, attention=model.attn_implementation))

    attention = model.attn_implementation

    def rehearse_step(step: Step) -> Rehearsed:
        return rehearse(lambda depth: build(config, step.dtype, depth, attention), shapes.depth, shapes.period, step)

    def assume(run: Run) -> object:
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
