"""The base model of a plan: its configuration, and dry runs of the engine that would train it.

`choose_engine` chooses that engine, as in a run: the fused engine itself is built on a few layers of the model on the
meta device, which shows whether it covers them. Whether it gives the right numbers can only be checked on a real GPU,
and is assumed.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from veneer.config import Model, Run, Train, UserError
from veneer.engine.choose import FULL_REASON, choose_engine
from veneer.engine.dry_run import DryRun, Step, extrapolate, head_is_linear, run_dry
from veneer.engine.fused import flash4
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.dry_run import (
    DryEngine,
    StepPeaks,
    dry_engine,
    predict_placement,
    require_covered,
    run_layers_dry,
)
from veneer.engine.placement import MemoryPlacement, Rates, whole_blocks
from veneer.model.shapes import Shapes, build, find_config, is_local, is_stored_in_4_bits, shapes_of
from veneer.model.trainable import require_trainable
from veneer.planning.batch_shapes import Lengths, RowShapes, assumed_rows, rows_of


@dataclass(frozen=True)
class _HashableConfig:
    """A configuration that compares and hashes by its content, as a key of the cache."""

    config: Any = field(compare=False)
    content: tuple[str, str, int, int | None]

    def build(self, step: Step, layers: int | None = None) -> Any:
        """Build the model on the meta device, with so many layers; None: as few as show all of its kinds."""
        _, attention, depth, _ = self.content
        return build(self.config, step.dtype, layers or self.period(step) or depth, attention)

    def period(self, step: Step) -> int | None:
        """Return the number of layers after which model and adapter repeat; None: they do not."""
        _, _, depth, period = self.content
        if period is None:
            return None
        on: list[set[tuple[str, int]]] = [set() for _ in range(depth)]
        for path in step.targets:
            if (found := re.search(r"\.(\d+)\.", path)) and int(found[1]) < depth:
                on[int(found[1])].add((path[found.end() :], step.rank_of(path)))
        for times in range(1, depth // (4 * period) + 1):
            if all(on[n] == on[n % (times * period)] for n in range(depth)):
                return times * period
        return None


@dataclass(frozen=True)
class _NamedConfig:
    """A configuration, its attention and the base's name, that compare and hash by their content."""

    config: Any = field(compare=False)
    content: tuple[str, str, str]


@lru_cache(maxsize=64)
def _shapes(known: _NamedConfig) -> Shapes:
    """Return the shapes of a base, with a cache: to build all of its layers takes a third of a plan."""
    _, attention, name = known.content
    base = build(deepcopy(known.config), torch.bfloat16, attention=attention)  # which changes it
    require_trainable(base, name)
    return shapes_of(base)


@lru_cache(maxsize=8)
def _engine(known: _HashableConfig, step: Step) -> DryEngine:
    """Build the fused engine of a dry run, with a cache: a placement is chosen for several budgets."""
    return dry_engine(known.build(step), step)


@lru_cache(maxsize=256)
def _dry_run(known: _HashableConfig, step: Step) -> DryRun:
    """Run dry, with a cache: planning again with, say, another optimizer costs nothing."""
    depth, period = known.content[2], known.period(step)
    if step.engine == "fused":
        return extrapolate(
            lambda layers, ends: run_layers_dry(known.build(step, layers), step, ends), depth, period, step.training
        )
    return run_dry(lambda layers: known.build(step, layers), depth, period, step, _head_is_linear(known))


@lru_cache(maxsize=256)
def _head_is_linear(known: _HashableConfig) -> bool:
    _, attention, depth, period = known.content
    return head_is_linear(build(known.config, torch.bfloat16, period or depth, attention))


@lru_cache(maxsize=256)
def _not_covered(known: _HashableConfig, step: Step) -> str | None:
    """Return the part of a model that the fused engine does not cover; None: it covers all."""
    try:
        require_covered(known.build(step), step)
    except NotCoveredError as error:
        return str(error)
    return None


class PlannedModel:
    """A base model to plan for; its weights are not read.

    Args:
        model: the base.
        data: lengths of the training and of the held-out rows; or their batch shapes; or the reason why there are none.

    Attributes:
        name: name of the base in the run.
        data: data, as given.
        shapes: shapes of the base.
        stored: dtype its weights are published in; None: not known.
        is_4bit: whether its files are in bitsandbytes' 4-bit format already.
        download_bytes: bytes to download first.

    Raises:
        UserError: there is no such base, or it cannot be trained.
    """

    def __init__(
        self, model: Model, data: tuple[Lengths, Lengths] | tuple[Lengths, Lengths, int] | RowShapes | str
    ) -> None:
        config = find_config(model)
        stored = getattr(config, "dtype", None)
        text = config.to_json_string(use_diff=False)
        self.name, self.data = model.base, data
        self.shapes = _shapes(_NamedConfig(config, (text, model.attn_implementation, model.base)))
        self.stored: torch.dtype | None = getattr(torch, stored) if isinstance(stored, str) else stored
        self.is_4bit = is_stored_in_4_bits(config)
        # FlexAttention, which caps scores without FlashAttention-4, has no keys of other documents.
        self._shares_prompts = not getattr(config, "attn_logit_softcapping", None) or flash4.is_installed()
        self.download_bytes = 0 if is_local(model) else self.shapes.total * (self.stored or torch.bfloat16).itemsize
        # Everything that decides a dry run, as a hashable key.
        self._known = _HashableConfig(config, (text, model.attn_implementation, self.shapes.depth, self.shapes.period))

    @property
    def has_pairs(self) -> bool:
        """Whether rows are pairs of documents, which are not packed."""
        return not isinstance(self.data, RowShapes | str) and len(self.data) == 3 and self.data[2] == 2

    def engine(self, train: Train, device: str, step: Step) -> tuple[str, str]:
        """Return the engine that trains it on a device, and the reason; the step gives precision and quantization."""
        if step.method == "full":
            if train.engine == "fused":
                raise UserError(f"train.engine = fused: {FULL_REASON}", "set train.engine to auto or reference")
            return "reference", FULL_REASON
        small = replace(step, rows=1, length=64, trained=1)
        return choose_engine(train.engine, device, lambda: _not_covered(self._known, small))

    def run_dry(self, step: Step) -> DryRun:
        """Run a micro-batch dry, as the step's engine would compute it."""
        return _dry_run(self._known, step)

    def placement(
        self, step: Step, gradient_checkpointing: bool | str, peaks: StepPeaks, budget_bytes: int, rates: Rates
    ) -> MemoryPlacement:
        """Return the placement that the step's engine would choose, from its least peak and the device's memory."""
        if step.engine == "reference":
            return whole_blocks(self.shapes.depth, gradient_checkpointing)
        engine, depth = _engine(self._known, step), self.shapes.depth
        return predict_placement(engine, step, depth, gradient_checkpointing, peaks, budget_bytes, rates)

    def rows(self, run: Run, engine: str) -> RowShapes:
        """Return batch shapes of a run's data for an engine; settings may differ from those it was read with."""
        if isinstance(self.data, RowShapes):
            return self.data
        if isinstance(self.data, str):
            return assumed_rows(run, self.shapes.positions, self.data)
        train, held_out, *more = self.data
        if engine != "fused" or not self._shares_prompts:
            train, held_out = train.without_shared(), held_out.without_shared()
        return rows_of(run, engine, train, held_out, *more)
