"""A run, foreseen: what it holds at each phase, whether that fits, how long it takes.

A planner has a base model (`PlannedModel`: its shapes, dry runs of an engine, the shapes of a run's batches) and a
place to run. It works the same for a model on disk and for a name, for data that was read and for data that was not,
for the machine at hand and for a card one thinks of buying.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch

from veneer.config import Run, UserError
from veneer.engine.dry_run import DryRun, Kept, Step
from veneer.engine.trace import Peak
from veneer.machine.cards import Card, find_card, parse_budget
from veneer.machine.device import Machine, find_machine, named_dtype, resolve_optim
from veneer.machine.speeds import Ceilings, ceilings_of, kept_ceilings
from veneer.model.dense import COPIES_SHARE
from veneer.model.shapes import Shapes
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Padded, RowShapes
from veneer.planning.held_out import SPARE, answers_peak, loss_peak, rows_that_fit
from veneer.planning.memory import adapter_bytes, copies_bytes, loaded, phases, resting, run_disk_bytes
from veneer.planning.time import seconds

CONTEXT = 790 * 2**20  # of a CUDA process, beside what the allocator has
LATER = 160 * 2**20  # of that, what comes only with work: a context that is there already has the rest
LAUNCH = 0.35  # of the host's time an operation, without autograd: 13.7 us a launch beside an H100
QUANTIZABLE = 0.5  # of the weights between embeddings and head; less, and 4 bits change little


@dataclass(frozen=True)
class TargetDevice:
    """Where it is to run.

    Attributes:
        device: cuda, cpu or mps.
        name: For a person.
        budget_bytes: What the run may hold there.
        dtype: Precision of compute where the run leaves it open.
        ceilings: How fast it is; None: not known.
        has_bfloat16: Whether bfloat16 is fast there.
        capability: Major compute capability of a GPU. Not known: one whose attention needs more memory.
    """

    device: str
    name: str
    budget_bytes: int
    dtype: torch.dtype
    ceilings: Ceilings | None
    has_bfloat16: bool
    capability: int = 8


def place_here(machine: Machine | None = None) -> TargetDevice:
    """This machine, with what is free on it now."""
    machine = machine or find_machine()
    free = machine.free_bytes - (LATER if machine.device == "cuda" else 0)
    name = f"{machine.name}, {machine.free_bytes / 2**30:.1f} of {machine.total_bytes / 2**30:.1f} GiB free"
    card = find_card(machine.name) if machine.device == "cuda" else None
    ceilings = kept_ceilings(machine) or (ceilings_of(card) if card else None)
    capability = card.capability // 10 if card else 8
    return TargetDevice(machine.device, name, free, machine.dtype, ceilings, machine.has_bfloat16, capability)


def place_of(gpu: str) -> TargetDevice:
    """A GPU by its name or its memory, with nothing else on it.

    Raises:
        UserError: An unknown card, or no amount of memory.
    """
    total, card = parse_budget(gpu)
    name = f"{card.name if card else 'a GPU'}, {total / 2**30:.1f} GiB"
    has_bfloat16, capability = (card.has_bfloat16, card.capability // 10) if card else (True, 8)
    return TargetDevice("cuda", name, total - CONTEXT, *_precision(card), has_bfloat16, capability)


def _precision(card: Card | None) -> tuple[torch.dtype, Ceilings | None]:
    if card is None:
        return torch.bfloat16, None
    return (torch.bfloat16 if card.has_bfloat16 else torch.float32), ceilings_of(card)


@dataclass(frozen=True)
class Forecast:
    """What a run will hold and take.

    Attributes:
        total, trainable: Parameters.
        phases: The peak of each phase, in the order of a run; `generation` is `veneer evaluate` afterwards.
        rows_at_a_time: Of the phases `evaluation` and `generation`, as `evaluate.batch_size` and memory allow.
        place: Where.
        engine, engine_reason: reference or fused, and why that one; it is checked again on the loaded model.
        kept: What the engine would keep from forward to backward of the memory that is left; None: it does not choose.
        rows: The data it was made for.
        host_bytes: Memory of the host; on a CPU, the peak itself.
        disk_bytes: What the run writes.
        download_bytes: What must be fetched first.
        step_seconds: Of an optimizer step, and its range; None: the speed of the place is not known.
        run_seconds: Of the whole run, and its range; None: that, or the number of its steps is not known.
    """

    total: int
    trainable: int
    phases: dict[str, Peak]
    rows_at_a_time: dict[str, int]
    place: TargetDevice
    engine: str
    engine_reason: str
    kept: Kept | None
    rows: RowShapes
    host_bytes: int
    disk_bytes: int
    download_bytes: int
    step_seconds: tuple[float, float, float] | None
    run_seconds: tuple[float, float, float] | None

    @property
    def peak_phase(self) -> str:
        """The fullest phase."""
        return self._fullest(self.phases)

    @property
    def training_phase(self) -> str:
        """The fullest phase of training itself, held-out losses among it."""
        return self._fullest(name for name in self.phases if name != "generation")

    @property
    def step_margin_bytes(self) -> int:
        """What is left of the budget beside training steps; evaluation takes no more of it than there is."""
        steps = self._fullest(name for name in self.phases if name not in self.rows_at_a_time)
        return self.place.budget_bytes - self.phases[steps].bytes

    def _fullest(self, names: Iterable[str]) -> str:
        return max(names, key=lambda name: self.phases[name].bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phases[self.peak_phase].bytes

    @property
    def margin_bytes(self) -> int:
        """What is left of the budget at the peak; less than nothing: it does not fit."""
        return self.place.budget_bytes - self.peak_bytes

    @property
    def verdict(self) -> str:
        """fits; tight: it may fail on what cannot be foreseen; does not fit."""
        if self.margin_bytes < 0:
            return "does not fit"
        return "fits" if self.margin_bytes >= SPARE * self.peak_bytes else "tight"

    def as_dict(self) -> dict[str, Any]:
        """As JSON; times in seconds as low, likely, high."""
        times = {"low": 0.0, "likely": 0.0, "high": 0.0}
        return {
            "parameters": {"total": self.total, "trainable": self.trainable},
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "fits": self.verdict != "does not fit",
            "verdict": self.verdict,
            "budget_bytes": self.place.budget_bytes,
            "margin_bytes": self.margin_bytes,
            "components": self.phases[self.peak_phase].components,
            "phases": {name: asdict(peak) for name, peak in self.phases.items()},
            "rows_at_a_time": self.rows_at_a_time,
            "engine": self.engine,
            "engine_reason": self.engine_reason,
            "kept": self.kept and self.kept.as_dict(),
            "place": {"device": self.place.device, "name": self.place.name},
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "download_bytes": self.download_bytes,
            "rows": asdict(self.rows)
            | {name: value._asdict() for name, value in vars(self.rows).items() if isinstance(value, Padded)},
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second, 1),
            "step_seconds": self.step_seconds and dict(zip(times, self.step_seconds)),
            "run_seconds": self.run_seconds and dict(zip(times, self.run_seconds)),
            "ceilings": self.place.ceilings and self.place.ceilings.source,
        }

    @property
    def tokens_per_second(self) -> float | None:
        return self.rows.tokens / self.step_seconds[1] if self.step_seconds else None


class Planner:
    """Forecasts of runs of one base at one place."""

    def __init__(self, base: PlannedModel, place: TargetDevice) -> None:
        self.base = base
        self.place = place
        self._run_dry = base.run_dry

    def forecast(self, run: Run) -> Forecast:
        """Foresee a run.

        Raises:
            UserError: An adapter target matches nothing, or the architecture cannot take the quantization.
        """
        return self.forecast_as(run, self._method(run))

    def _method(self, run: Run) -> str:
        return "qlora" if run.quantization or self.base.is_4bit else "lora"

    def forecast_as(self, run: Run, method: str) -> Forecast:
        """Foresee a run as full fine-tuning, as LoRA in 16 bits, or as QLoRA: method full, lora or qlora."""
        shapes, place = self.base.shapes, self.place
        engine, reason, rows = self._engine(run, method)
        optim = resolve_optim(run.train.optim, place.device)
        step = step_of(run, method, shapes, rows.fullest, place, engine, rows.even)
        dry = self._run_dry(step)
        found = phases(shapes, step, optim, dry, place.device)
        held_out, at_a_time = None, {}
        answered = rows.answered
        if rows.held_out is not None and answered is not None:
            held = resting(shapes, step, optim, dry, place.device)[0]
            at_a_time["evaluation"], rows, held_out = self._held_out(run, step, dry, held, rows)
            found["evaluation"] = loss_peak(held, dry, held_out[1])
            at_a_time["generation"], found["generation"] = self.answers(run, answered, method)
        sizes = shapes.adapter(step.targets, step.r)
        trainable = shapes.total if method == "full" else sum(sizes)
        peak = max(peak.bytes for peak in found.values())
        paged = adapter_bytes(sizes) * 2 if optim.startswith("paged") else 0
        spare = place.budget_bytes - max(peak.bytes for name, peak in found.items() if name != "generation")
        kept = None
        if engine == "fused" and run.train.gradient_checkpointing == "auto" and spare > 0:
            kept = self.base.placement(step, spare, place.budget_bytes)
        updated = 1 if engine == "fused" else len(sizes)
        timed = self._times(step, held_out, rows, run, kept, updated) if place.ceilings else (None, None)
        return Forecast(
            total=shapes.total + (trainable if method != "full" else 0),
            trainable=trainable,
            phases=found,
            rows_at_a_time=at_a_time,
            place=place,
            engine=engine,
            engine_reason=reason,
            kept=kept,
            rows=rows,
            host_bytes=peak if place.device != "cuda" else HOST_BYTES + paged,
            disk_bytes=run_disk_bytes(trainable, rows.steps, run.train),
            download_bytes=self.base.download_bytes,
            step_seconds=timed[0],
            run_seconds=timed[1],
        )

    def answers(self, run: Run, rows: Padded, method: str | None = None) -> tuple[int, Peak]:
        """How many rows `veneer evaluate` takes at a time, and what it holds then.

        Args:
            run: The settings.
            rows: How many rows there are, and the most tokens and trained tokens of one.
            method: See `forecast_as`; None: as the run says.
        """
        shapes, place = self.base.shapes, self.place
        step = step_of(run, method or self._method(run), shapes, Padded(1, 1, 1), place)
        held = loaded(shapes, step, place.device)

        def peak_of(count: int) -> Peak:
            asked = step_for_held_out(step, Padded(count, rows.length, count * rows.trained))
            return answers_peak(held, shapes, asked, self._run_dry(asked), run.evaluate.max_new_tokens)

        most = min(run.evaluate.batch_size, rows.rows)
        count = rows_that_fit(most, peak_of, sum(held.values()), place.budget_bytes)
        return count, peak_of(count)

    def _held_out(
        self, run: Run, step: Step, train: DryRun, held: Mapping[str, int], rows: RowShapes
    ) -> tuple[int, RowShapes, tuple[Step, DryRun]]:
        """How many rows the held-out loss takes at a time, the data in such batches, and the largest's dry run."""

        def batches_of(count: int) -> RowShapes:
            if count == run.evaluate.batch_size:
                return rows
            smaller = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"batch_size": count})})
            return self.base.rows(smaller, step.engine)

        def dry(count: int) -> tuple[Step, DryRun]:
            batch = batches_of(count).held_out
            assert batch is not None
            asked = step_for_held_out(step, batch)
            return asked, self._run_dry(asked)

        def peak_of(count: int) -> Peak:
            return loss_peak(held, train, dry(count)[1])

        count = rows_that_fit(run.evaluate.batch_size, peak_of, sum(held.values()), self.place.budget_bytes)
        return count, batches_of(count), dry(count)

    def rows(self, run: Run) -> RowShapes:
        """What a run's data will be like for the engine it gets."""
        return self._engine(run, self._method(run))[2]

    def _engine(self, run: Run, method: str) -> tuple[str, str, RowShapes]:
        """Which engine a run gets, why, and its data as that will meet it."""
        any_step = step_of(run, method, self.base.shapes, Padded(1, 1, 1), self.place)
        engine, reason = self.base.engine(run.train, self.place.device, any_step)
        return engine, reason, self.base.rows(run, engine)

    def _times(
        self,
        step: Step,
        held_out: tuple[Step, DryRun] | None,
        rows: RowShapes,
        run: Run,
        kept: Kept | None,
        updated: int,
    ) -> tuple[tuple[float, float, float], tuple[float, float, float] | None]:
        """Of a step and of the run, with their ranges; `updated`: tensors that the optimizer steps."""
        ceilings = self.place.ceilings
        assert ceilings is not None
        low, high = ceilings.spread
        usual = replace(step, rows=rows.typical.rows, length=rows.typical.length, trained=rows.typical.trained)
        host = 1.0 if step.engine == "reference" else LAUNCH
        records = rows.even or run.train.gradient_checkpointing == "auto"  # else there is no room to

        def taken(asked: Step) -> float:
            found = self._run_dry(asked)
            replayed = rows.replayed if found.records and records else 0.0
            launched = seconds(found.work, ceilings, host)
            return replayed * seconds(found.work, ceilings, 0.0) + (1 - replayed) * launched

        once = rows.passes * (taken(usual) if kept is None else _kept_seconds(usual, kept, taken))
        once += UPDATES * updated * ceilings.host_seconds  # gradients clipped, and each tensor stepped
        if rows.steps is None:
            return (low * once, once, high * once), None
        whole = rows.steps * once
        if held_out is not None:
            times = 1 + (rows.steps - 1) // run.train.eval_steps if run.train.eval_steps else 1
            whole += times * rows.held_out_passes * seconds(held_out[1].work, ceilings, host)
        return (low * once, once, high * once), (low * whole, whole, high * whole)


def _kept_seconds(step: Step, kept: Kept, taken: Callable[[Step], float]) -> float:
    """Time of a pass in which blocks keep different tensors: each as if all kept what it keeps, in proportion."""
    depth = sum(kept.blocks.values())
    whole = sum(count / depth * taken(replace(step, keep=names)) for names, count in kept.blocks.items())
    if kept.share_16_bits:
        everything = replace(step, keep=None)
        whole -= kept.share_16_bits * (taken(everything) - taken(replace(everything, keeps_16_bits=True)))
    return whole


HOST_BYTES = 3 * 2**30  # of a process with CUDA's libraries; weights are read through, not held
UPDATES = 2  # operations a tensor


def step_of(
    run: Run,
    method: str,
    shapes: Shapes,
    batch: Padded,
    place: TargetDevice,
    engine: str = "reference",
    even: bool = True,
) -> Step:
    """The micro-batch of a run, for a dry run.

    Raises:
        UserError: An adapter target matches nothing, or the architecture cannot take the quantization.
    """
    quantized, dtype = frozenset[str](), named_dtype(run.model.dtype, place.dtype)
    if method == "qlora":
        quantized = shapes.quantizable()
        _require_quantizable(shapes)
    return Step(
        rows=batch.rows,
        length=batch.length,
        trained=batch.trained,
        dtype=dtype,
        method=method,
        targets=frozenset() if method == "full" else shapes.targets(run.adapter.target_modules),
        quantized=quantized,
        r=run.adapter.r,
        dropout=run.adapter.lora_dropout,
        double_quant=run.quantization.double_quant if run.quantization else True,
        checkpointing=run.train.gradient_checkpointing is not False,
        engine=engine,
        keep=None if run.train.gradient_checkpointing is False else frozenset(),
        keeps_last=run.train.gradient_checkpointing is True,
        even=even,
        capability=place.capability,
        accumulating=run.train.gradient_accumulation_steps > 1,
        copies=place.device == "cpu" and COPIES_SHARE * copies_bytes(shapes, quantized, dtype) <= place.budget_bytes,
    )


def step_for_held_out(step: Step, batch: Padded) -> Step:
    """The same without training."""
    return Step(
        batch.rows, batch.length, batch.trained, step.dtype, step.method, step.targets, step.quantized, step.r,
        double_quant=step.double_quant, engine=step.engine, even=step.even, capability=step.capability, training=False,
        copies=step.copies,
    )  # fmt: skip


def _require_quantizable(shapes: Shapes) -> None:
    ends = {f"{path}.weight" for path in (*shapes.embeddings, shapes.head) if path}
    quantized = {f"{path}.weight" for path in shapes.quantizable()}
    inner = {name: prod(shape) for name, shape in shapes.weights.items() if name not in ends}
    share = sum(count for name, count in inner.items() if name in quantized) / max(1, sum(inner.values()))
    if share < QUANTIZABLE:
        largest = max((name for name in inner if name not in quantized), key=lambda name: inner[name])
        raise UserError(
            f"quantization: only {share:.0%} of {shapes.architecture}'s weights lie in linear layers, which is what 4 "
            f"bits can store ({largest} is not one)",
            "leave the section `quantization` out, or name another model.base",
        )
