"""Predicts a run that classifies: Transformers' own model with its head, run dry on the meta device.

Layers are not extrapolated, since such models are small. Held-out losses and `veneer predict` take the same batches.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from veneer.config import Run
from veneer.engine.dry_run import DryRun, Step, adapt
from veneer.engine.placement import whole_blocks
from veneer.engine.trace import FlashAttention, Peak, Trace
from veneer.machine.device import named_dtype, resolve_optim
from veneer.model.adapters import find_method
from veneer.model.classifier import build_classifier, classifier_shapes, head_of, require_classifies
from veneer.model.quiet import quiet
from veneer.model.shapes import Shapes, find_config, is_local
from veneer.planning.batch_shapes import Lengths, Padded, RowShapes, assumed_rows, rows_of
from veneer.planning.forecast import Forecast
from veneer.planning.held_out import rows_that_fit
from veneer.planning.memory import adapter_bytes, optimizer_bytes, persistent, phases, run_disk_bytes
from veneer.planning.target import TargetDevice
from veneer.planning.time import seconds

WHY = "classifiers run on Transformers"


class PlannedBase(NamedTuple):
    """The base of a classifier's plan."""

    shapes: Shapes


@dataclass(frozen=True)
class ClassifierPlanner:
    """Forecasts runs that classify; as `planning.planner.Planner` does others.

    Attributes:
        base: shapes of the base.
        target: the device.
        config: Transformers' configuration of the base.
        head: paths of the modules that are trained whole.
        labels: number of labels.
        lengths: lengths of the training and held-out rows; or the reason why there are none.
    """

    base: PlannedBase
    target: TargetDevice
    config: Any
    head: list[str]
    labels: int
    lengths: tuple[Lengths, Lengths] | str

    @staticmethod
    def of(run: Run, target: TargetDevice, labels: int, lengths: tuple[Lengths, Lengths] | str) -> "ClassifierPlanner":
        """Build the base on the meta device.

        Raises:
            UserError: there is no such base, or no head for it.
        """
        config = find_config(run.model)
        require_classifies(config, run.model.base)
        base = build_classifier(config, labels)
        head = head_of(base)
        return ClassifierPlanner(PlannedBase(classifier_shapes(base, head)), target, config, head, labels, lengths)

    def forecast(self, run: Run) -> Forecast:
        """Forecast a run.

        Raises:
            UserError: an adapter target matches nothing.
        """
        shapes, target = self.base.shapes, self.target
        rows = self._rows(run)
        optim = resolve_optim(run.train.optim, target.device)
        step = self._step(run, rows.fullest)
        head = map(build_classifier(self.config, self.labels).get_submodule, self.head)
        sizes = [parameter.numel() for module in head for parameter in module.parameters()]
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
        timed = self._times(run, rows) if target.ceilings else (None, None)
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
            disk_bytes=run_disk_bytes(trainable, rows.steps, run.train),
            download_bytes=0 if is_local(run.model) else shapes.total * 4,
            step_seconds=timed[0],
            run_seconds=timed[1],
        )

    def _rows(self, run: Run) -> RowShapes:
        if isinstance(self.lengths, str):
            return assumed_rows(run, self.base.shapes.positions, self.lengths)
        return rows_of(run, "reference", *self.lengths)

    def _step(self, run: Run, batch: Padded, training: bool = True) -> Step:
        shapes = self.base.shapes
        return Step(
            rows=batch.rows,
            length=batch.length,
            trained=batch.rows,
            dtype=named_dtype(run.model.dtype, self.target.dtype),
            method="lora" if run.quantization is None else "qlora",
            targets=shapes.targets(run.adapter),
            quantized=frozenset() if run.quantization is None else frozenset(shapes.linears) - shapes.beside,
            adapter=find_method(run.adapter),
            r=run.adapter.r,
            rank_pattern=tuple(run.adapter.rank_pattern.items()),
            dropout=run.adapter.lora_dropout,
            checkpointing=run.train.gradient_checkpointing is not False,
            accumulating=run.train.gradient_accumulation_steps > 1,
            training=training,
        )

    def _run_dry(self, step: Step) -> DryRun:
        base = build_classifier(self.config, self.labels).to(step.dtype)
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
            logits_BC = base(input_ids=ids_BL).logits
            if step.training:
                trace.mark("backward", "working set")
                logits_BC.sum().backward()
        return DryRun(dict(trace.peaks), trace.total_work())

    def _times(self, run: Run, rows: RowShapes) -> tuple[tuple[float, float, float], tuple[float, float, float] | None]:
        assert self.target.ceilings is not None
        low, high = self.target.ceilings.spread
        once = rows.passes * seconds(self._run_dry(self._step(run, rows.typical)).work, self.target.ceilings)
        whole = None if rows.steps is None else rows.steps * once
        return (low * once, once, high * once), whole and (low * whole, whole, high * whole)


def _with(peak: Peak, more: Counter[str]) -> Peak:
    parts = Counter(peak.components) + more
    return Peak(sum(parts.values()), dict(parts))
