"""Makes forecasts of runs: the engine, the peak of each phase, the placement of tensors, the time of a step.

A planner has a base model (`PlannedModel`: its shapes, dry runs of an engine, batch shapes of a run) and a device. It
works the same for a model on disk and for a name, for data that was read and for data that was not, for this machine
and for any card.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import torch

from veneer.config import Adapter, Run, UserError
from veneer.engine.dry_run import DryRun, Step
from veneer.engine.fused.dry_run import StepPeaks
from veneer.engine.fused.policy import block_placement
from veneer.engine.placement import MemoryPlacement
from veneer.engine.trace import Peak
from veneer.machine.device import named_dtype, resolve_optim, unpaged
from veneer.machine.speeds import Ceilings
from veneer.model.adapters import find_method, require_method
from veneer.model.adapters.from_base import doubled, refuse_4_bits, starts_from_base
from veneer.model.adapters.from_error import refuse_without_4_bits, starts_from_error
from veneer.model.dense import COPIES_SHARE
from veneer.model.shapes import Shapes
from veneer.model.start import require_possible
from veneer.model.trained_parts import TrainedParts, find_parts
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Padded, RowShapes
from veneer.planning.forecast import Forecast
from veneer.planning.full_states import FullStates
from veneer.planning.held_out import generation_peak, held_out_peak, rows_that_fit
from veneer.planning.memory import (
    adapter_bytes,
    copies_bytes,
    loaded,
    off_device,
    persistent,
    phases,
    run_disk_bytes,
    with_start,
)
from veneer.planning.target import TargetDevice
from veneer.planning.time import seconds

LAUNCH = 0.35  # share of the host's time an operation that remains without autograd: 13.7 us a launch on an H100 host
QUANTIZABLE = 0.5  # least share of the weights between embeddings and head that 4 bits must store
HOST_BYTES = 3 * 2**30  # a process with CUDA's libraries; weights pass through without staying
UPDATES = 2  # operations per updated tensor
FULL_UPDATES = 8  # times as many for a whole weight
MEASURED_BY_LOSS = {"loss", "perplexity"}  # names of `evaluate.during` for which nothing is answered


class Planner:
    """Forecasts runs of one base on one device."""

    def __init__(self, base: PlannedModel, target: TargetDevice) -> None:
        self.base = base
        self.target = target

    def forecast(self, run: Run, placement: MemoryPlacement | None = None) -> Forecast:
        """Forecast a run.

        Args:
            run: settings of the run.
            placement: placement of its tensors; None: the one that it would choose.

        Raises:
            UserError: an adapter target matches nothing, or the architecture cannot take the quantization.
        """
        method = self._method(run)
        require_possible(run, self.base.is_4bit)
        if method == "qlora" and run.adapter is not None and starts_from_base(run.adapter):
            raise refuse_4_bits(run.adapter.init_lora_weights)
        if (
            run.adapter is not None
            and starts_from_error(run.adapter)
            and (run.quantization is None or self.base.is_4bit)
        ):
            raise refuse_without_4_bits()
        return self.forecast_as(run, method, placement)

    def _method(self, run: Run) -> str:
        if run.adapter is None:
            return "full"
        return "qlora" if run.quantization or self.base.is_4bit else "lora"

    def forecast_as(self, run: Run, method: str, placement: MemoryPlacement | None = None) -> Forecast:
        """Forecast a run as full fine-tuning, LoRA in 16 bits or QLoRA: method full, lora or qlora."""
        if method == "full" and run.train.master_weights == "auto":
            return self._with_masters_that_fit(run, placement)
        shapes, target = self.base.shapes, self.target
        engine, reason, rows = self._engine(run, method)
        optim = resolve_optim(run.train.optim, target.device)
        full = FullStates(run.train.optim_rank, run.train.master_weights == "float32")
        step = step_of(run, method, shapes, rows.fullest, target, engine, rows.even)
        whole = step.sizes_in_16_bits(shapes)
        if whole:
            optim = unpaged(optim)
        dry = self.base.run_dry(step)
        found = phases(shapes, step, optim, dry, target.device, full)
        if method != "full":
            assert run.adapter is not None
            found["load"] = with_start(found["load"], shapes, step, run.adapter.init_lora_weights)
        held_out, at_a_time, answered, one_row = None, {}, rows.answered, dict[str, Peak]()
        if rows.held_out is not None and answered is not None:
            held = persistent(shapes, step, optim, dry, target.device, full)[0]
            at_a_time["evaluation"], rows, held_out, one_row["evaluation"] = self._held_out(run, step, dry, held, rows)
            found["evaluation"] = held_out_peak(held, dry, held_out[1])
            at_a_time["generation"], found["generation"] = self.generation(run, answered, method)
        sizes = step.adapter_sizes(shapes)
        saved = shapes.total if method == "full" else sum(sizes)
        frozen = 0 if method == "full" else round(step.adapter.frozen_share * (saved - sum(step.parts.sizes(shapes))))
        # Each process keeps the base in 4 bits as it was loaded.
        copies = step.shards * found["load"].components["4-bit weights"] if step.shards > 1 else 0
        paged = adapter_bytes(sizes) * 2 if optim.startswith("paged") else 0
        smallest = {name: peak for name, peak in found.items() if name not in at_a_time} | one_row
        least = max(peak.bytes for peak in smallest.values())
        peaks = StepPeaks(least, found["forward"].bytes)
        setting = run.train.gradient_checkpointing
        placement = placement or self.base.placement(step, setting, peaks, target.budget_bytes, target.rates)
        tightest = self.base.placement(step, setting, peaks, 0, target.rates)
        least_bytes = min(
            max(off_device(name, peak, placed).bytes for name, peak in smallest.items())
            for placed in (tightest, placement)
        )
        resident_bytes = max(peak.bytes for peak in found.values())
        if least > target.budget_bytes:  # else what is on the host is there for the sake of speed
            found = {name: off_device(name, peak, placement) for name, peak in found.items()}
        peak = max(peak.bytes for peak in found.values())
        each = FULL_UPDATES if method == "full" or whole else 1
        updated = 1 if engine == "fused" else each * len(shapes.weights if method == "full" else sizes)
        timed = self._times(step, held_out, rows, run, placement, updated) if target.ceilings else (None, None)
        return Forecast(
            total=shapes.total + (saved if method != "full" else 0),
            trainable=saved - frozen,
            phases=found,
            rows_at_a_time=at_a_time,
            target=target,
            engine=engine,
            engine_reason=reason,
            placement=placement,
            least_bytes=least_bytes,
            resident_bytes=resident_bytes,
            rows=rows,
            host_bytes=peak if target.device != "cuda" else HOST_BYTES + paged + placement.host_bytes + copies,
            disk_bytes=self.disk_bytes(run, saved, rows.steps, method),
            download_bytes=self.base.download_bytes,
            step_seconds=timed[0],
            run_seconds=timed[1],
            streamed_bytes=least_bytes if tightest.streams else None,
            master_weights=run.train.master_weights if method == "full" else None,
        )

    def _with_masters_that_fit(self, run: Run, placement: MemoryPlacement | None) -> Forecast:
        """Forecast full fine-tuning with a float32 copy of 16-bit weights if that fits, else without."""

        def forecast(masters: str) -> Forecast:
            train = run.train.model_copy(update={"master_weights": masters})
            return self.forecast_as(run.model_copy(update={"train": train}), "full", placement)

        if named_dtype(run.model.dtype, self.target.dtype).itemsize == 4:
            return forecast("none")
        found = forecast("float32")
        return found if found.peak_bytes <= self.target.budget_bytes else forecast("none")

    def disk_bytes(self, run: Run, trainable: int, steps: int | None, method: str | None = None) -> int:
        """Return the bytes that a run writes.

        Args:
            run: the settings.
            trainable: trained parameters.
            steps: steps of the run; None: not known.
            method: method of `forecast_as`; None: that of the run.
        """
        if (method or self._method(run)) != "full":
            step = step_of(run, method or self._method(run), self.base.shapes, Padded(1, 1, 1), self.target)
            whole = sum(step.sizes_in_16_bits(self.base.shapes))  # saved in 16 bits, with a copy among the states
            return run_disk_bytes(4 * trainable - 2 * whole, 8 * trainable + 4 * whole, steps, run.train)
        itemsize = named_dtype(run.model.dtype, self.target.dtype).itemsize
        full = FullStates(run.train.optim_rank, run.train.master_weights == "float32")
        states = sum(
            full.bytes(self.base.shapes, resolve_optim(run.train.optim, self.target.device), itemsize).values()
        )
        return run_disk_bytes(itemsize * trainable, states, steps, run.train)

    def generation(self, run: Run, rows: Padded, method: str | None = None) -> tuple[int, Peak]:
        """Return the batch size of `veneer evaluate`, and its peak.

        Args:
            run: the settings.
            rows: number of rows, and the most tokens and trained tokens of one.
            method: method of `forecast_as`; None: that of the run.
        """
        shapes, target = self.base.shapes, self.target
        step = step_of(run, method or self._method(run), shapes, Padded(1, 1, 1), target)
        held = loaded(shapes, step, target.device)

        def peak_of(count: int) -> Peak:
            asked = step_for_held_out(step, Padded(count, rows.length, count * rows.trained))
            dry, most = self.base.run_dry(asked), run.evaluate.max_new_tokens
            return generation_peak(held, shapes, asked, dry, most, target.device)

        most = min(run.evaluate.batch_size, rows.rows)
        count = rows_that_fit(most, peak_of, sum(held.values()), target.budget_bytes)
        return count, peak_of(count)

    def _held_out(
        self, run: Run, step: Step, train: DryRun, held: Mapping[str, int], rows: RowShapes
    ) -> tuple[int, RowShapes, tuple[Step, DryRun], Peak]:
        """Return the held-out batch size, shapes of such batches, the largest one's dry run; and one row's peak."""

        def batches_of(count: int) -> RowShapes:
            if count == run.evaluate.batch_size:
                return rows
            smaller = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"batch_size": count})})
            return self.base.rows(smaller, step.engine)

        def dry(count: int) -> tuple[Step, DryRun]:
            batch = batches_of(count).held_out
            assert batch is not None
            asked = step_for_held_out(step, batch)
            return asked, self.base.run_dry(asked)

        def peak_of(count: int) -> Peak:
            return held_out_peak(held, train, dry(count)[1])

        count = rows_that_fit(run.evaluate.batch_size, peak_of, sum(held.values()), self.target.budget_bytes)
        return count, batches_of(count), dry(count), peak_of(1)

    def rows(self, run: Run) -> RowShapes:
        """Return batch shapes of a run's data for its engine."""
        return self._engine(run, self._method(run))[2]

    def _engine(self, run: Run, method: str) -> tuple[str, str, RowShapes]:
        """Return the engine of a run, the reason, and batch shapes of its data."""
        any_step = step_of(run, method, self.base.shapes, Padded(1, 1, 1), self.target)
        engine, reason = self.base.engine(run.train, self.target.device, any_step)
        return engine, reason, self.base.rows(run, engine)

    def _times(
        self,
        step: Step,
        held_out: tuple[Step, DryRun] | None,
        rows: RowShapes,
        run: Run,
        placement: MemoryPlacement,
        updated: int,
    ) -> tuple[tuple[float, float, float], tuple[float, float, float] | None]:
        """Return times of a step and of the run, with ranges; `updated`: tensors that the optimizer updates."""
        ceilings = self.target.ceilings
        assert ceilings is not None
        usual = replace(step, rows=rows.typical.rows, length=rows.typical.length, trained=rows.typical.trained)
        host = 1.0 if step.engine == "reference" else LAUNCH
        records = rows.even or run.train.gradient_checkpointing == "auto"  # else no memory is reserved for recordings

        def taken(asked: Step) -> float:
            found = self.base.run_dry(asked)
            replayed = rows.replayed if found.records and records and not placement.streams else 0.0
            launched = seconds(found.work, ceilings, host)
            return replayed * seconds(found.work, ceilings, 0.0) + (1 - replayed) * launched

        once = rows.passes * (_pass_seconds(usual, placement, taken) + placement.link_seconds)
        once += UPDATES * updated * ceilings.host_seconds  # gradients are clipped, and each tensor is updated
        low, high = ceilings.spread
        if rows.steps is None:
            return (low * once, once, high * once), None
        whole = rows.steps * once
        if held_out is not None:
            times = 1 + (rows.steps - 1) // run.train.eval_steps if run.train.eval_steps else 1
            whole += times * rows.held_out_passes * seconds(held_out[1].work, ceilings, host)
            whole += times * self._answering_seconds(run, step, rows, ceilings)
        return (low * once, once, high * once), (low * whole, whole, high * whole)

    def _answering_seconds(self, run: Run, step: Step, rows: RowShapes, ceilings: Ceilings) -> float:
        """Return the time in which the sample of `evaluate.during` is answered once; 0: nothing is answered.

        Answers are taken to be as long as they may become, which is what a model does that does not end them yet.
        """
        if rows.answered is None or not set(run.evaluate.during) - MEASURED_BY_LOSS:
            return 0.0
        most, length, trained = rows.answered
        new = min(run.evaluate.max_new_tokens, 2 * trained)
        count = max(1, min(most, run.evaluate.during_tokens // (length + new)))
        at_a_time = min(count, run.evaluate.batch_size)
        plain = step_of(run, step.method, self.base.shapes, Padded(1, 1, 1), self.target)  # Transformers generates

        def taken(tokens: int) -> float:
            asked = step_for_held_out(plain, Padded(at_a_time, tokens, at_a_time))
            return seconds(self.base.run_dry(asked).work, ceilings)

        # A pass of one token is taken as one of two, the first of which no model predicts.
        return math.ceil(count / at_a_time) * (taken(length) + new * taken(2))


def _pass_seconds(step: Step, placement: MemoryPlacement, taken: Callable[[Step], float]) -> float:
    """Return the time of a pass; with several block placements, a mean of passes with one each, by their share."""
    if not placement.bytes:
        return taken(step)
    counts = Counter(block.on_device() for block in placement.blocks).items()
    return sum(count / len(placement.blocks) * taken(replace(step, block=block)) for block, count in counts)


def step_of(
    run: Run,
    method: str,
    shapes: Shapes,
    batch: Padded,
    target: TargetDevice,
    engine: str = "reference",
    even: bool = True,
) -> Step:
    """Describe the micro-batch of a run for a dry run.

    Raises:
        UserError: an adapter target matches nothing, or the architecture cannot take the quantization.
    """
    quantized, dtype = frozenset[str](), named_dtype(run.model.dtype, target.dtype)
    adapter = run.adapter or Adapter()  # of full fine-tuning, nothing of it counts
    plain = doubled(adapter)
    first = shapes.vocabulary  # ids do not matter here
    new_tokens = range(first, first + len(run.data.add_special_tokens or ()))
    parts = TrainedParts() if method == "full" else find_parts(shapes, adapter, new_tokens)
    if (parts.modules or parts.biases) and dtype == torch.float16:
        setting = "modules_to_save" if parts.modules else f"bias = {adapter.bias}"
        raise UserError(
            f"adapter.{setting}: the compute dtype is float16, and gradients of whole weights overflow in it",
            "set model.dtype: bfloat16 or float32; rows of embeddings (adapter.trainable_token_indices, "
            "data.add_special_tokens) are trained in float32 whatever the dtype",
        )
    if method == "qlora":
        quantized = shapes.quantizable()
        _require_quantizable(shapes)
        if in_4_bits := sorted(parts.modules & quantized):
            raise UserError(
                f"adapter.modules_to_save: {in_4_bits[0]} is in 4 bits, which cannot be trained whole",
                "leave it out, or leave the section `quantization` out",
            )
    targets = frozenset[str]() if method == "full" else shapes.targets(adapter)
    require_method(adapter, shapes, targets, quantized)
    if run.train.loraplus_lr_ratio is not None and (run.adapter is None or not find_method(adapter).is_lora):
        raise UserError(
            f"train.loraplus_lr_ratio = {run.train.loraplus_lr_ratio:g}: only lora and dora have the B matrices whose "
            f"rate it is, and the run has adapter{'' if run.adapter is None else '.method'}: "
            f"{'none' if run.adapter is None else adapter.method}",
            "leave it out",
        )
    return Step(
        rows=batch.rows,
        length=batch.length,
        trained=batch.trained,
        dtype=dtype,
        method=method,
        targets=targets,
        quantized=quantized,
        adapter=find_method(adapter),
        r=plain.r,
        rank_pattern=tuple(plain.rank_pattern.items()),
        dropout=adapter.lora_dropout,
        double_quant=run.quantization.double_quant if run.quantization else True,
        checkpointing=run.train.gradient_checkpointing is not False,
        engine=engine,
        block=None if run.train.gradient_checkpointing is False else block_placement(()),
        keeps_last=run.train.gradient_checkpointing is True,
        even=even,
        capability=target.capability if engine == "fused" else Step.capability,
        accumulating=run.train.gradient_accumulation_steps > 1,
        releases=run.releases_gradients,
        copies=target.device == "cpu" and COPIES_SHARE * copies_bytes(shapes, quantized, dtype) <= target.budget_bytes,
        parts=parts,
        shards=target.ranks if engine == "fused" and quantized and run.train.shard == "layers" else 1,
    )


def step_for_held_out(step: Step, batch: Padded) -> Step:
    """Return the step of a held-out batch: the same without training."""
    return Step(
        batch.rows, batch.length, batch.trained, step.dtype, step.method, step.targets, step.quantized,
        step.adapter, step.r, double_quant=step.double_quant, engine=step.engine, even=step.even,
        capability=step.capability, training=False, copies=step.copies,
        rank_pattern=step.rank_pattern, parts=step.parts,
    )  # fmt: skip


def _require_quantizable(shapes: Shapes) -> None:
    ends = {f"{path}.weight" for path in (*shapes.embeddings, shapes.head) if path}
    quantized = {f"{path}.weight" for path in shapes.quantizable()}
    inner = {name: prod(shape) for name, shape in shapes.weights.items() if name not in ends}
    share = sum(count for name, count in inner.items() if name in quantized) / max(1, sum(inner.values()))
    if share < QUANTIZABLE:
        largest = max((name for name in inner if name not in quantized), key=lambda name: inner[name])
        raise UserError(
            f"quantization: only {share:.0%} of {shapes.architecture}'s weights are in linear layers, which is what 4 "
            f"bits can store ({largest} is not one)",
            "leave the section `quantization` out, or name another model.base",
        )
