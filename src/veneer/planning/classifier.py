"""Predicts a run that classifies: Transformers' own model with its head, run dry on the meta device.

Layers are not extrapolated, since such models are small. Held-out losses and `veneer predict` take the same batches.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch

from veneer.config import Model, Run
from veneer.engine.dry_run import DryRun, Step, adapt
from veneer.engine.placement import MemoryPlacement, whole_blocks
from veneer.engine.trace import FlashAttention, Peak, Trace
from veneer.machine.device import named_dtype, resolve_optim
from veneer.model.adapters import find_method
from veneer.model.classifier import build_classifier, classifier_shapes, head_of, require_classifies
from veneer.model.quiet import quiet
from veneer.model.shapes import find_config, is_local, is_stored_in_4_bits
from veneer.model.start import require_possible
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Lengths, Padded, RowShapes
from veneer.planning.forecast import Forecast
from veneer.planning.held_out import rows_that_fit
from veneer.planning.memory import adapter_bytes, optimizer_bytes, persistent, phases, run_disk_bytes
from veneer.planning.planner import Planner
from veneer.planning.time import seconds

Seconds = tuple[float, float, float]  # low, likely, high
WHY = "classifiers run on Transformers"


class PlannedClassifier(PlannedModel):
    """The base of a classifier to plan for; its weights are not read.

    Args:
        model: the base.
        labels: number of labels; 0: there is no head.
        data: lengths of the training and of the held-out rows, and how many examples a row is; or the reason why
            there are none.

    Raises:
        UserError: there is no such base, or no head for it.
    """

    def __init__(self, model: Model, labels: int, data: tuple[Lengths, Lengths, int] | str) -> None:
        self.config, self.labels, self.task = find_config(model), labels, model.task
        require_classifies(self.config, model.base, self.task)
        self.is_4bit = is_stored_in_4_bits(self.config)
        base = self.build()
        self.head = head_of(base, self.task)
        self.name, self.data = model.base, data
        self.shapes = classifier_shapes(base, self.head)
        self.download_bytes = 0 if is_local(model) else self.shapes.total * 4

    def build(self) -> Any:
        """Build the base with its head on the meta device."""
        return build_classifier(self.config, self.labels, self.task)

    def head_sizes(self) -> list[int]:
        """Return the sizes of the head's parameters."""
        modules = map(self.build().get_submodule, self.head)
        return [parameter.numel() for module in modules for parameter in module.parameters()]


class ClassifierPlanner(Planner):
    """Forecasts runs that classify."""

    base: PlannedClassifier

    def forecast(self, run: Run, placement: MemoryPlacement | None = None) -> Forecast:
        """Forecast a run; Transformers follows `train.gradient_checkpointing` and has one placement.

        Raises:
            UserError: an adapter target matches nothing.
        """
        require_possible(run, self.base.is_4bit)
        shapes, target = self.base.shapes, self.target
        rows = self.base.rows(run, "reference")
        optim = resolve_optim(run.train.optim, target.device)
        step = self._step(run, rows.fullest)
        sizes = self.base.head_sizes()
        trained = adapter_bytes(sizes)
        beside = Counter({"adapter": trained, "optimizer": optimizer_bytes(sizes, optim)})
        dry = self._run_dry(step)
        found = phases(shapes, step, optim, dry, target.device)
        for name in ("forward", "backward", "optimizer"):
            gradients = Counter({"gradients": trained if name != "forward" or step.accumulating else 0})
            found[name] = _with(found[name], beside + gradients)
        at_a_time = {}
        if rows.held_out is not None:
            held = persistent(shapes, step, optim, dry, target.device)[0] + beside
            length = rows.held_out.length

            def peak_of(count: int) -> Peak:
                tested = self._run_dry(self._step(run, Padded(count, length, count), training=False))
                return _with(tested.peaks["forward"], held)

            most = run.evaluate.batch_size
            at_a_time["evaluation"] = rows_that_fit(most, peak_of, sum(held.values()), target.budget_bytes)
            found["evaluation"] = peak_of(at_a_time["evaluation"])
        least = max(peak.bytes for peak in found.values())
        trainable = sum(sizes) + sum(step.adapter_sizes(shapes))
        timed = self._run_seconds(run, rows)
        return Forecast(
            total=shapes.total + trainable,
            trainable=trainable,
            phases=found,
            rows_at_a_time=at_a_time,
            target=target,
            engine="reference",
            engine_reason=WHY,
            placement=whole_blocks(shapes.depth, run.train.gradient_checkpointing),
            least_bytes=least,
            resident_bytes=least,
            rows=rows,
            host_bytes=least if target.device != "cuda" else 3 * 2**30,
            disk_bytes=run_disk_bytes(4 * trainable, 8 * trainable, rows.steps, run.train),
            download_bytes=self.base.download_bytes,
            step_seconds=timed[0],
            run_seconds=timed[1],
        )

    def _step(self, run: Run, batch: Padded, training: bool = True) -> Step:
        shapes, adapter, method = self.base.shapes, run.adapter, self._method(run)
        assert adapter is not None, "require_possible has refused it"
        return Step(
            rows=batch.rows,
            length=batch.length,
            trained=batch.rows,
            dtype=named_dtype(run.model.dtype, self.target.dtype),
            method=method,
            targets=shapes.targets(adapter),
            quantized=frozenset() if method == "lora" else frozenset(shapes.linears) - shapes.beside,
            adapter=find_method(adapter),
            r=adapter.r,
            rank_pattern=tuple(adapter.rank_pattern.items()),
            dropout=adapter.lora_dropout,
            checkpointing=run.train.gradient_checkpointing is not False,
            accumulating=run.train.gradient_accumulation_steps > 1,
            training=training,
        )

    def _run_dry(self, step: Step) -> DryRun:
        base = self.base.build().to(step.dtype)
        adapt(base, step)
        if step.training and step.checkpointing:
            recomputed = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), FlashAttention())}
            with quiet():
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=recomputed)
        base.train(step.training)
        ids_BL = torch.empty((step.rows, step.length), dtype=torch.int64, device="meta")
        trace = Trace()
        with trace, torch.set_grad_enabled(step.training):
            trace.mark("forward", "activations")
            outputs = base(input_ids=ids_BL)[0]  # logits, or hidden states
            if step.training:
                trace.mark("backward", "working set")
                outputs.sum().backward()
        return DryRun(dict(trace.peaks), trace.total_work())

    def _run_seconds(self, run: Run, rows: RowShapes) -> tuple[Seconds | None, Seconds | None]:
        """Return times of a step and of the run."""
        ceilings = self.target.ceilings
        if ceilings is None:
            return None, None
        once = rows.passes * seconds(self._run_dry(self._step(run, rows.typical)).work, ceilings)
        low, high = ceilings.spread
        step = (low * once, once, high * once)
        whole = None if rows.steps is None else (rows.steps * step[0], rows.steps * step[1], rows.steps * step[2])
        return step, whole


def _with(peak: Peak, more: Counter[str]) -> Peak:
    parts = Counter(peak.components) + more
    return Peak(sum(parts.values()), dict(parts))
