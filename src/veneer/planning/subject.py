"""What a plan is made for: a base model by its configuration, as the engine that its run gets would train it.

Which engine that is follows the rule of `choose.build`, and not a copy of it: the fused engine itself is put on a few
layers of the model on the meta device, and says whether it covers them. What only a real GPU can tell, whether it gives
the right numbers there, is taken for granted.
"""

import re
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from veneer.config import Model, Run, UserError
from veneer.engine.choose import FUSED_DEVICES
from veneer.engine.dry_run import DryRun, Kept, Step, carried_on, run_dry
from veneer.engine.fused import NotCoveredError
from veneer.engine.fused.dry_run import require_covered, run_layers_dry, spending
from veneer.model.shapes import build, find_config, is_at_hand, is_stored_in_4_bits, shapes_of
from veneer.model.trainable import require_trainable
from veneer.planning.batch_shapes import Lengths, rows_of
from veneer.planning.forecast import Rows, Subject, assumed_rows


class _Known:
    """A configuration that equals another with the same content."""

    def __init__(self, config: Any, content: tuple[str, str, int, int | None]) -> None:
        self.config = config
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)

    def build(self, step: Step, layers: int | None = None) -> Any:
        """The model on the meta device, with so many layers; None: as few as tell all of it."""
        _, attention, depth, _ = self.content
        return build(self.config, step.dtype, layers or self.period(step) or depth, attention)

    def period(self, step: Step) -> int | None:
        """After how many layers the model repeats, with the adapter that the step has on them; None: it does not."""
        _, _, depth, period = self.content
        if period is None:
            return None
        on: list[set[str]] = [set() for _ in range(depth)]
        for path in step.targets:
            if (found := re.search(r"\.(\d+)\.", path)) and int(found[1]) < depth:
                on[int(found[1])].add(path[found.end() :])
        for times in range(1, depth // (4 * period) + 1):
            if all(on[n] == on[n % (times * period)] for n in range(depth)):
                return times * period
        return None


@lru_cache(maxsize=256)
def _dry_run(known: _Known, step: Step) -> DryRun:
    """A dry run; planning the same again, with another optimizer say, costs nothing."""
    depth, period = known.content[2], known.period(step)
    if step.engine == "fused":
        return carried_on(
            lambda layers, ends: run_layers_dry(known.build(step, layers), step, ends), depth, period, step.training
        )
    return run_dry(lambda layers: known.build(step, layers), depth, period, step)


@lru_cache(maxsize=256)
def _not_covered(known: _Known, step: Step) -> str | None:
    """What of a model the fused engine does not compute; None: it covers it."""
    try:
        require_covered(known.build(step), step)
    except NotCoveredError as error:
        return str(error)
    return None


def _engine(known: _Known, run: Run, device: str, step: Step) -> tuple[str, str]:
    """Which engine a run gets, and why."""
    setting = run.train.engine
    if step.method == "full":
        return "reference", "full fine-tuning has no other"
    if setting == "reference":
        return "reference", "train.engine asks for the reference engine"
    if setting == "auto" and device not in FUSED_DEVICES:
        return "reference", "the fused engine is made for CUDA GPUs"
    small = replace(step, rows=1, length=64, trained=1)
    missing = "Apple's GPU" if device == "mps" else _not_covered(known, small)
    if missing is None:
        return "fused", "it covers this model"
    reason = f"the fused engine does not cover {missing}"
    if setting == "fused":
        raise UserError(f"train.engine = fused: {reason}", "set train.engine to auto or reference")
    return "reference", reason


def subject_of(model: Model, data: tuple[Lengths, Lengths] | str) -> Subject:
    """What to plan for.

    Args:
        model: The base; its weights are not touched.
        data: Lengths of the training and of the held-out rows, or why there are none.

    Raises:
        UserError: There is no such base, or it cannot be planned for.
    """
    config = find_config(model)
    stored = getattr(config, "dtype", None)  # before it is built in another
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    base = build(config, torch.bfloat16, attention=model.attn_implementation)
    require_trainable(base, model.base)
    shapes = shapes_of(base)
    # What decides the dry run, in a form that can be compared.
    content = config.to_json_string(use_diff=False), model.attn_implementation, shapes.depth, shapes.period
    known = _Known(config, content)

    def rows(run: Run, engine: str) -> Rows:
        return rows_of(run, engine, *data) if isinstance(data, tuple) else assumed_rows(run, shapes.positions, data)

    def spend(step: Step, spare_bytes: int, budget_bytes: int) -> Kept:
        return spending(known.build(step), step, shapes.depth, spare_bytes, budget_bytes)

    return Subject(
        name=model.base,
        shapes=shapes,
        engine=partial(_engine, known),
        run_dry=partial(_dry_run, known),
        spend=spend,
        rows=rows,
        stored=stored,
        is_4bit=is_stored_in_4_bits(config),
        download_bytes=0 if is_at_hand(model) else shapes.total * (stored or torch.bfloat16).itemsize,
    )
